import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.llava_instruct import read_turns
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from tests.data.readers import miniature_language
from tests.data.readers.miniature import save_json, scene
from tests.data.readers.miniature_language import said


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    miniature_language.make_llava_instruct(folder)
    return folder


def test_turns_are_one_conversation_without_marks(root):
    reader = open_reader("llava_instruct_150k", root)
    assert len(reader) == 5
    expected = [
        [("What is here?", "A picture."), ("Of what?", "Of things.")],
        [("What colour is it?", "Green.")],
        [("What do you see?", "Something.")],  # the greeting in front and the open question at the end are left out
    ]
    for number, turns in enumerate(expected):
        annotation = reader[number]
        assert [(request.words[0], *request.answer) for request in annotation.requests] == turns
        assert annotation.task == "dialogue" and not annotation.regions
        assert annotation.size == scene(number).image.shape[:2] == open_picture(reader, number, "it").shape[:2]
        assert annotation.provenance.id == str(miniature_language.LARGE + number)


def test_a_missing_picture_and_a_damaged_conversation_are_named(root):
    reader = open_reader("llava_instruct_150k", root)
    with pytest.raises(ImageError, match="no picture at .*000000000003.jpg"):
        reader[3]
    with pytest.raises(
        AnnotationError, match="150k.json, entry 4: human and gpt have to take turns, .* human, gpt, gpt"
    ):
        reader[4]


@pytest.mark.parametrize("entry", [7, {"image": "000000000000.jpg"}, {"image": "x.jpg", "conversations": [{}]}])
def test_a_damaged_entry_is_named(tmp_path, entry):
    miniature_language.make_llava_instruct(tmp_path)
    save_json([entry], tmp_path / "llava_dataset/llava_instruct_150k.json")
    reader = open_reader("llava_instruct_150k", tmp_path)
    with pytest.raises(AnnotationError, match="entry 0 needs image and conversations"):
        reader[0]


def test_white_space_goes_with_the_mark_only():
    (turn,) = read_turns(said(" <image> Who? \n", " Nobody. "))
    assert (turn.words, turn.answer) == (("Who?",), (" Nobody. ",))


@pytest.mark.parametrize("spoken", [[], said("Alone?"), said("Alone.", first="gpt")])
def test_nothing_but_a_question_is_no_conversation(spoken):
    with pytest.raises(AnnotationError, match="no question has an answer"):
        read_turns(spoken)


@pytest.mark.parametrize("missing", ["llava_dataset/llava_instruct_150k.json", "coco/train2017"])
def test_an_incomplete_folder_says_what_is_expected(missing, tmp_path):
    miniature_language.make_llava_instruct(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=f"no .*{missing}. Expected are:\n  llava_dataset"):
        open_reader("llava_instruct_150k", tmp_path)
