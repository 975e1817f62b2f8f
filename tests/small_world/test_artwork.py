"""Emoji artwork: the names, from code points to SVG, the packages' sums, the cache. Nothing is fetched here."""
import json
import re
import subprocess
from collections import Counter

import numpy as np
import pytest

from minipali.errors import InputError
from minipali.small_world import artwork
from minipali.small_world.drawing_tasks import article, plural

ICONS = {
    "width": 32, "height": 64,
    "icons": {"dog": {"body": "<path d='M0 0'/>"}, "t-shirt": {"body": "<g/>", "width": 8, "left": 3}},
    "aliases": {"hound": {"parent": "dog"}, "pooch": {"parent": "hound"}},
}  # fmt: skip
CHARS = {"1f415": "dog", "1f455-fe0f": "t-shirt", "1f1e6-1f1e8": "flag", "1f999": "llama"}


def test_names_are_plain_and_distinct():
    names = artwork.names()
    assert 290 <= len(names) <= 320
    assert names["1F415"] == "dog"
    assert all(re.fullmatch("[0-9A-F]{4,5}", point) and 0x2000 < int(point, 16) for point in names)
    assert all(re.fullmatch("[a-z]+( [a-z]+){0,2}", name) for name in names.values())
    for words in names.values(), map(plural, names.values()), map(article, names.values()):
        [(word, times)] = Counter(words).most_common(1)
        assert times == 1, word


@pytest.mark.parametrize("name, one, many", [
    ("dog", "a dog", "dogs"), ("octopus", "an octopus", "octopuses"), ("unicorn", "a unicorn", "unicorns"),
    ("hourglass", "an hourglass", "hourglasses"), ("house", "a house", "houses"), ("mouse", "a mouse", "mice"),
    ("ice cream cone", "an ice cream cone", "ice cream cones"), ("slice of cake", "a slice of cake", "slices of cake"),
    ("loaf of bread", "a loaf of bread", "loaves of bread"), ("butterfly", "a butterfly", "butterflies"),
    ("monkey", "a monkey", "monkeys"), ("fish", "a fish", "fish"), ("box of fries", "a box of fries", "boxes of fries"),
    ("pair of scissors", "a pair of scissors", "pairs of scissors"), ("maple leaf", "a maple leaf", "maple leaves"),
])  # fmt: skip
def test_one_and_many(name, one, many):
    assert (article(name), plural(name)) == (one, many)


def test_every_artist_has_a_license_and_a_checksum():
    assert len(artwork.ARTISTS) == 9
    for artist in artwork.ARTISTS.values():
        assert artist.license in ("Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0")
        assert len(artist.sha512) == 88
    assert {name for name, _ in artwork.EXCLUDED} <= set(artwork.ARTISTS)
    assert {point for _, point in artwork.EXCLUDED} <= set(artwork.names())


def test_icons_by_code_point_where_the_package_tells_them():
    assert artwork.icons_of(ICONS, CHARS, {}) == {"1F415": "dog", "1F455": "t-shirt"}


def test_icons_by_name_elsewhere():
    """Spelling does not matter, aliases count, and the first of two names wins."""
    known = artwork.unicode_names({
        "🐕": {"name": "Dog"}, "👕\ufe0f": {"name": "T-Shirt"}, "🇦🇨": {"name": "flag"}})
    assert known == {"dog": "1F415", "tshirt": "1F455"}
    assert artwork.icons_of(ICONS, {}, known) == {"1F415": "dog", "1F455": "t-shirt"}
    older = {"icons": {"hound": {"body": ""}}}
    assert artwork.icons_of(older, {}, known) == {}
    known = artwork.with_old_names(known, {**ICONS, "aliases": {"hound": {"parent": "dog"}}}, CHARS)
    assert artwork.icons_of(older, {}, known) == {"1F415": "hound"}


def test_svg_is_square_and_has_the_view_of_its_icon():
    text = artwork.svg(ICONS, "pooch")
    assert "<path d='M0 0'/>" in text
    assert 'viewBox="0 0 32 64"' in text
    assert f'width="{artwork.SIDE}" height="{artwork.SIDE}"' in text
    assert 'viewBox="3 0 8 64"' in artwork.svg(ICONS, "t-shirt")


def npm(monkeypatch, content, code=0, words=""):
    """A stand-in for npm that packs these bytes."""
    def run(command, **_):
        assert command[:2] == ["npm", "pack"]
        folder = command[command.index("--pack-destination") + 1]
        with open(f"{folder}/package.tgz", "wb") as file:
            file.write(content)
        return subprocess.CompletedProcess(command, code, "package.tgz\n", words)
    monkeypatch.setattr(artwork.subprocess, "run", run)


def test_a_package_with_another_sum_is_refused(monkeypatch, tmp_path):
    npm(monkeypatch, b"abc")
    right = "3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw=="  # of "abc"
    artist = artwork.Artist("some-package", "1.0.0", right, "MIT", "")
    assert artwork.fetch(artist, tmp_path).read_bytes() == b"abc"
    npm(monkeypatch, b"abd")
    with pytest.raises(InputError, match="some-package@1.0.0: has the sum sha512-.*, expected sha512-3a81"):
        artwork.fetch(artist, tmp_path)


def test_what_npm_says_is_passed_on(monkeypatch, tmp_path):
    npm(monkeypatch, b"", 1, "npm error code\nENOTFOUND")
    with pytest.raises(InputError, match=r"could not fetch it \(npm error code ENOTFOUND\)"):
        artwork.fetch(artwork.UNICODE, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="npm: cannot be run"):
        artwork.fetch(artwork.UNICODE, tmp_path)


def test_the_cache_keeps_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pictures = {(artist, point): rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
                for artist in ("noto", "openmoji") for point in ("1F415", "2603")}
    path = tmp_path / "new" / "drawings.npz"
    artwork.write_cache(path, pictures)
    found = artwork.load(path)
    assert list(found) == list(pictures)
    assert all(np.array_equal(found[key], pictures[key]) for key in pictures)


@pytest.mark.parametrize("content", [None, b"", b"no zip file at all", b"PK\x03\x04 not quite"])
def test_without_a_cache_one_line_says_what_makes_it(tmp_path, content):
    path = tmp_path / "drawings.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"drawings.npz: no cache of drawings \(.*-m minipali.small_world.artwork"):
        artwork.load(path)


def test_collect_gives_every_set_its_drawings(monkeypatch, tmp_path):
    """What is listed, by every artist who has it, but not where one drew something else."""
    unicode_names = {"🐕": {"name": "dog"}, "☂": {"name": "umbrella"}}
    unicode = {"1F415": "dog", "2602": "umbrella"}
    icons = {"icons": {"dog": {"body": "dog"}, "umbrella": {"body": "umbrella"}, "cat": {"body": "cat"}}}
    monkeypatch.setattr(artwork, "fetch", lambda artist, folder: artist.package)
    monkeypatch.setattr(artwork, "read_member", lambda archive, name: {
        "icons.json": icons, "chars.json": {}, "data-by-emoji.json": unicode_names}[name])
    monkeypatch.setattr(artwork, "render", lambda text: re.search(">(.*)</svg>", text)[1])
    found = artwork.collect(tmp_path, {"1F415": "dog", "2602": "umbrella", "1F999": "llama"})
    expected = {(name, point): thing for name in artwork.ARTISTS for point, thing in unicode.items()}
    del expected["firefox", "2602"]
    assert found == expected


def test_names_are_the_contract_s_file():
    assert artwork.names() == json.loads(artwork.NAMES.read_text(encoding="utf-8"))
