"""Emoji artwork for the small model's drawings: its artists, where it is fetched from, and its cache.

    python -m minipali.small_world.artwork

fetches nine sets of drawings from the npm registry (`npm` must be installed), checks their checksums, renders what
`weights/drawings.json` lists with resvg (`pip install resvg-py`) and writes one file outside the repository. Only
training and evaluation need it. CC BY and CC BY-SA licenses require the artist's name wherever a drawing is shown, so
the pictures in the repository itself come from the Apache and MIT sets.
"""

import base64
import functools
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minipali.errors import InputError, Parser, path_name, prepare_process, run_command
from minipali.files import make_folder, read_json, replacing

NAMES = Path(__file__).resolve().parents[2] / "weights" / "drawings.json"  # code point -> name
CACHE = Path.home() / ".cache" / "minipali" / "drawings.npz"
SIDE = 96  # pixels of a rendered drawing


@dataclass(frozen=True)
class Artist:
    """One set of drawings: its npm package, the package's sha512 as npm states it, and the license of the drawings."""

    package: str
    version: str
    sha512: str
    license: str
    source: str


ARTISTS = {
    "noto": Artist(
        "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "noto-v1": Artist(
        "@iconify-json/noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "fluent": Artist(
        "@iconify-json/fluent-emoji", "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "fluent-flat": Artist(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "emojione": Artist(
        "@iconify-json/emojione", "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo"),
    "emojione-v1": Artist(
        "@iconify-json/emojione-v1", "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "CC-BY-SA-4.0", "https://github.com/joypixels/emojione-legacy"),
    "openmoji": Artist(
        "@iconify-json/openmoji", "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0", "https://github.com/hfg-gmuend/openmoji"),
    "firefox": Artist(
        "@iconify-json/fxemoji", "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0", "https://github.com/mozilla/fxemoji"),
    "twemoji": Artist(
        "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
}  # fmt: skip
TEST = "twemoji"  # the test artist: not for training, and no decision may depend on it
VALIDATION = "fluent-flat"  # the validation artist: decisions are made on it; --all-artists trains on it afterwards
UNICODE = Artist(  # the names of all code points, for the sets that have only names
    "unicode-emoji-json", "0.9.0",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    "MIT", "https://github.com/muan/unicode-emoji-json")  # fmt: skip

# Left out: drawings that show something else than the other artists' of the same code point.
EXCLUDED = {
    ("emojione-v1", "1F3BE"), ("openmoji", "1F3BE"),  # tennis: the ball alone, not the racket
    ("emojione-v1", "1F4BB"),  # laptop: a desktop computer
    ("firefox", "1F3B2"),  # die: a domino
    ("firefox", "1F576"),  # sunglasses on a face
    ("firefox", "2602"),  # umbrella: closed
    ("emojione-v1", "1F6E1"),  # shield: a road sign
}  # fmt: skip


@functools.cache
def names():
    """{code point: name} of `weights/drawings.json`, such as {"1F415": "dog"}."""
    return read_json(NAMES)


# --- fetching -------------------------------------------------------------------------------------------------------

def fetch(artist, folder):
    """Fetch a package's archive to `folder`. Raises InputError without npm, network or the right checksum."""
    wanted = f"{artist.package}@{artist.version}"
    try:
        done = subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), wanted],
                              capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"npm: cannot be run ({error.strerror}); it fetches the drawings") from None
    if done.returncode or not done.stdout.split():
        raise InputError(f"{wanted}: npm could not fetch it ({' '.join(done.stderr.split())[:200]})")
    path = Path(folder) / done.stdout.split()[-1]
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != artist.sha512:
        raise InputError(f"{wanted}: has the sum sha512-{digest}, expected sha512-{artist.sha512}")
    return path


def read_member(archive, name):
    """The content of one JSON file in a package."""
    with tarfile.open(archive) as package:
        return json.load(package.extractfile(f"package/{name}"))


# --- from code points to SVG ----------------------------------------------------------------------------------------

def normalized(name):
    """A name without case and punctuation: "T-Shirt", "t-shirt" and "tshirt" become the same."""
    return re.sub("[^a-z0-9]", "", name.lower())


def code_points(chars):
    """{icon: code point} from a package's chars.json: emoji of one code point, not counting the variation selector."""
    point_of = {}
    for key, icon in chars.items():
        points = [point for point in key.upper().split("-") if point != "FE0F"]
        if len(points) == 1:
            point_of.setdefault(icon, points[0])
    return point_of


def unicode_names(by_emoji):
    """{normalized name: code point} from unicode-emoji-json."""
    point_of = {}
    for emoji, about in by_emoji.items():
        points = [f"{ord(character):X}" for character in emoji if character != "\ufe0f"]
        if len(points) == 1:
            point_of[normalized(about["name"])] = points[0]
    return point_of


def with_old_names(known, icons, chars):
    """`known` and the aliases of a set that has code points, since the older sets use older names."""
    point_of, names = code_points(chars), dict(known)
    for alias, about in icons.get("aliases", {}).items():
        if about["parent"] in point_of:
            names.setdefault(normalized(alias), point_of[about["parent"]])
    for icon, point in point_of.items():
        names.setdefault(normalized(icon), point)
    return names


def icons_of(icons, chars, known):
    """{code point: icon} of a set: by its chars.json where that has entries, else by name."""
    if chars:
        return {point: icon for icon, point in code_points(chars).items() if icon in icons["icons"]}
    icon_of = {}
    for icon in [*icons["icons"], *icons.get("aliases", {})]:
        if (point := known.get(normalized(icon))) is not None:
            icon_of.setdefault(point, icon)
    return icon_of


def svg(icons, icon):
    """The SVG text of an icon, or of the icon that it is an alias of, to be rendered SIDE pixels high and wide."""
    while icon not in icons["icons"]:
        icon = icons["aliases"][icon]["parent"]
    about = icons["icons"][icon]
    left, top = about.get("left", 0), about.get("top", 0)
    width, height = (about.get(key, icons.get(key, 16)) for key in ("width", "height"))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" '
            f'height="{SIDE}" viewBox="{left} {top} {width} {height}">{about["body"]}</svg>')


# --- the cache ------------------------------------------------------------------------------------------------------

def render(text):
    """An SVG text as a picture, uint8 (SIDE, SIDE, 4): red, green, blue, alpha."""
    try:
        import resvg_py
    except ImportError:
        raise InputError("resvg-py: the package is missing; pip install resvg-py") from None
    png = resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def collect(folder, wanted):
    """{(artist, code point): picture} of the code points in `wanted`; the archives go to `folder`."""
    archives = {name: fetch(artist, folder) for name, artist in ARTISTS.items()}
    known = unicode_names(read_member(fetch(UNICODE, folder), "data-by-emoji.json"))
    for name in ("noto", "openmoji"):
        known = with_old_names(known, *(read_member(archives[name], part) for part in ("icons.json", "chars.json")))
    pictures = {}
    for name, archive in archives.items():
        icons, chars = (read_member(archive, part) for part in ("icons.json", "chars.json"))
        icon_of = icons_of(icons, chars, known)
        for point in wanted:
            if point in icon_of and (name, point) not in EXCLUDED:
                pictures[name, point] = render(svg(icons, icon_of[point]))
    return pictures


def write_cache(path, pictures):
    """Write the pictures as one file: a few megabytes for a few thousand drawings."""
    artists, points = zip(*pictures)
    make_folder(path.parent)
    with replacing(path) as file:
        pixels = np.stack([*pictures.values()])
        np.savez_compressed(file, artists=np.array(artists), points=np.array(points), pixels=pixels)


@functools.cache
def load(path=CACHE):
    """{(artist, code point): picture (SIDE, SIDE, 4) uint8} from the cache. Raises InputError if there is none."""
    try:
        with open(path, "rb") as stream, np.load(stream) as file:
            artists, points, pixels = (file[key] for key in ("artists", "points", "pixels"))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        how = "python -m minipali.small_world.artwork makes it"
        raise InputError(f"{path}: no cache of drawings ({error}); {how}") from None
    return dict(zip(zip(artists.tolist(), points.tolist()), pixels))


def main(arguments):
    parser = Parser("minipali.small_world.artwork", "Fetch and render the drawings that the small world shows.",
                    "  python -m minipali.small_world.artwork")
    parser.add_argument("--cache", type=path_name, default=CACHE, metavar="FILE",
                        help=f"the file to write (default {CACHE})")
    cache = Path(parser.parse_args(arguments).cache)
    with tempfile.TemporaryDirectory() as folder:
        pictures = collect(folder, names())
    write_cache(cache, pictures)
    print(f"{'set':12} {'drawings':>8}  license of the drawings")
    for name, artist in ARTISTS.items():
        count = sum(who == name for who, _ in pictures)
        print(f"{name:12} {count:8}  {artist.license:13} {artist.source}")
    print(f"{len(names())} names, {len(pictures)} drawings, {cache.stat().st_size / 1e6:.1f} MB in {cache}")


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.artwork", main, sys.argv[1:]))
