"""What a slice of chips would run, compiled without one: memory, communication and bounds on time."""
