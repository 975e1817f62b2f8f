"""Boxes to text and back, whatever the model says, and the pictures that show them."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minipali.outputs.boxes import Detection, parse, to_text
from minipali.outputs.draw import draw_detections
from minipali.outputs.sheets import contact_sheet, similarity_picture

CAT = "<loc0000><loc0341><loc0682><loc1023>"  # ymin 0, xmin 1/3, ymax 2/3, xmax 1
SEGS = "".join(f"<seg{code:03d}>" for code in range(0, 128, 8))

edges = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)
labels = st.sampled_from(["", "cat", "red circle", "Zebra crossing, wet", "naïve 猫 🐈", "a<b>c", "loc0001"])
codes = st.just(()) | st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)


def test_one_object():
    """y comes first in the text, x first in the box."""
    assert parse(CAT + " cat", 150, 300) == [Detection("cat", (100.0, 0.0, 300.0, 100.0))]


def test_steps():
    (box,) = (detection.box for detection in parse(CAT, 1024, 1024, steps=1024))
    assert box == (341.0, 0.0, 1023.0, 682.0)


def test_several_objects_and_words():
    text = f"{CAT} a black cat ; {CAT}{SEGS}  wet   dog;{CAT}"
    assert [(d.label, d.codes) for d in parse(text, 10, 10)] == [
        ("a black cat", ()), ("wet dog", tuple(range(0, 128, 8))), ("", ())]


@pytest.mark.parametrize("text", [
    "", "no idea", "<loc0001>", "<loc0001><loc0002><loc0003>", "<loc0001><loc0002><loc0003> cat",
    CAT + "<loc0001> cat", CAT + CAT + " cat",                      # five and eight: which four would it be?
    "<loc0000><loc0000><loc0100><loc1024> cat", "<loc0000><loc0000><loc0100><loc9999> cat",
    "<loc0500><loc0000><loc0100><loc0100> cat", "<loc0000><loc0500><loc0100><loc0100> cat",  # swapped
    "<loc0100><loc0000><loc0100><loc0100> cat", "<loc0000><loc0100><loc0100><loc0100> cat",  # empty
    "<loc000><loc0001><loc0002><loc0003> cat", "<loc00001><loc0001><loc0002><loc0003> cat", SEGS,
])
def test_what_is_no_box_is_left_out(text):
    """And it takes no other box with it."""
    assert parse(text, 10, 10) == []
    assert [d.label for d in parse(f"{text} ; {CAT} dog", 10, 10)] == ["dog"]


@pytest.mark.parametrize("shape", [
    "<seg001>", SEGS[:-8], SEGS + "<seg001>", SEGS[:-8] + "<seg128>", SEGS[:-8] + "<seg99>"])
def test_a_broken_shape_leaves_the_box(shape):
    (detection,) = parse(f"{CAT}{shape} cat", 10, 10)
    assert (detection.box, detection.codes) == (parse(CAT, 10, 10)[0].box, ())


def test_text_around_boxes_is_passed_over():
    assert [d.label for d in parse(f"Here: {CAT} cat ; and {CAT} dog", 10, 10)] == ["cat", "dog"]


@given(st.lists(st.tuples(edges, edges, labels, codes), max_size=4), st.integers(1, 5000), st.integers(1, 5000))
def test_text_and_back(objects, width, height):
    detections = []
    for (y0, y1), (x0, x1), label, shape in objects:
        box = (x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height)
        detections.append(Detection(label, box, shape))
    assert parse(to_text(detections, height, width), height, width) == detections


def test_encoding_rounds_to_the_nearest_and_clips():
    """Truncating, the usual slip, would give 0511 and 0001."""
    assert to_text([Detection("x", (-3, 5.12, 25, 0.0199))], 10, 10) == "<loc0524><loc0000><loc0002><loc1023> x"


pieces = st.sampled_from([CAT, SEGS, " ; ", "<loc0001>", "<seg001>", "<loc", "0999>", "<seg", "cat", "\n", ";", "<>"])


@given(st.lists(pieces | st.text("<>locseg0123 ;é\n", max_size=8), max_size=12).map("".join))
def test_parse_never_raises_and_gives_only_boxes_inside(text):
    for detection in parse(text, 480, 640):
        x0, y0, x1, y1 = detection.box
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480
        assert len(detection.codes) in (0, 16)
        assert ";" not in detection.label


@pytest.mark.parametrize("size", [(1, 1), (112, 112), (30, 7), (900, 600), (3, 2000)])
def test_draw(size):
    """A small picture is enlarged, a large one keeps its size; the given one stays as it was."""
    picture = Image.new("RGB", size, "white")
    text = f"{CAT} cat ; {CAT}{SEGS} {'long ' * 80} ; <loc0100><loc0100><loc0900><loc0900>"
    drawn = draw_detections(picture, parse(text, *size[::-1]), [np.ones(size[::-1]), None, np.zeros(size[::-1], bool)])
    assert drawn.width % size[0] == 0 and drawn.width * size[1] == drawn.height * size[0]
    assert 480 <= max(drawn.size) or max(size) >= 320
    assert np.asarray(picture).min() == 255 and np.asarray(drawn).min() < 255


def test_draw_puts_the_box_where_it_says():
    drawn = np.asarray(draw_detections(Image.new("RGB", (800, 600), "white"), [Detection("", (200, 150, 600, 450))]))
    rows, columns = np.nonzero((drawn < 255).any(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (200, 150, 599, 449)


def test_draw_tints_the_mask_and_nothing_else():
    mask = np.zeros((600, 800), bool)
    mask[200:300, 300:400] = True
    drawn = np.asarray(draw_detections(Image.new("RGB", (800, 600), "white"), [Detection("", (200, 150, 600, 450))],
                                       [mask]))
    np.testing.assert_array_equal((drawn < 255).any(-1)[160:440, 210:590], mask[160:440, 210:590])


def test_labels_do_not_hide_one_another():
    """Two objects in the same box: what two labels cover is what each covers alone, in other places."""
    picture, box = Image.new("RGB", (800, 600), "white"), (200, 150, 600, 450)

    def covered(*names):
        return np.count_nonzero((np.asarray(draw_detections(picture,
                                                            [Detection(n, box) for n in names])) < 255).any(-1))

    frame = covered("")
    assert covered("cat", "dog") - frame > 1.8 * (covered("cat") - frame)


def test_similarity_picture():
    """Darker is more alike; the matrix must fit what it compares."""
    images = [Image.new("RGB", (20, 30), color) for color in ["red", "green", "blue"]]
    picture = similarity_picture(np.array([[0.9, 0.1], [0.5, 0.4], [-0.2, 0.8]]), images, ["one", "two " * 60])
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= {color for _, color in picture.getcolors(2**24)}
    assert similarity_picture(np.zeros((1, 1)), images[:1], [""]).mode == "RGB"
    with pytest.raises(ValueError, match=r"\(3, 2\).*images, texts"):
        similarity_picture(np.zeros((2, 3)), images, ["one", "two"])


def test_contact_sheet():
    images = [Image.new("RGB", (20, 10 + i), (10 * i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(images, [f"caption {i} " * i for i in range(5)], 2)
    assert {(10 * i, 0, 0) for i in range(5)} <= {color for _, color in sheet.getcolors(2**24)}
    assert contact_sheet(images[:1], ["x"], 4).width < sheet.width
    with pytest.raises(ValueError):
        contact_sheet(images, ["too few"], 2)
