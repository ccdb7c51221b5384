"""What is trained: each objective has init, loss and evaluate, and knows no mesh and no file."""
