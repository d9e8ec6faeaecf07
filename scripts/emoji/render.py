"""Renders every emoji in its three hands, 128 x 128 on white, into a gallery and shards for training.

usage: python scripts/emoji/render.py [--output data/emoji]     (after fetch.py)

Writes
    OUTPUT/gallery/STYLE/CODEPOINTS.png   what judge_emoji.py reads; code points in hex joined by "-", without fe0f
    OUTPUT/train.array_record             the pictures that are trained on, each with CAPTIONS captions
    OUTPUT/validation.array_record        those that hyperparameters may be chosen by
    OUTPUT/held_out.array_record          those that are judged, and train nothing
    OUTPUT/index.jsonl                    N lines, one `records.Record` each, by style and code points
    OUTPUT/summary.json                   counts, and the pictures that did not render, by name
"""

import argparse
import collections
import io
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

import emoji
import fetch
import numpy as np
import resvg_py
from captions import training_caption
from judge_emoji import held_out
from PIL import Image
from records import VARIATION, Record, base_group, codepoints_of, is_validation, write_index

from latentdiff.data import write_array_record

SIZE = 128
EMOJI_VERSION = "2.16.0"
CAPTIONS = 16  # of each showing of a picture
MANY = 18  # pictures of one base emoji; those of one that has fewer are shown twice as often


class BrokenPicture(ValueError):
    """An SVG does not render, or renders to nothing."""


def svg_document(icons: Mapping, name: str) -> str:
    """A whole SVG document for an icon of an Iconify set, its aliases and turns resolved.

    Args:
        icons: the parsed `icons.json`.
        name: an icon's or an alias' name.

    Returns:
        The document, SIZE x SIZE, the icon centred where it is not square.

    Raises:
        BrokenPicture: the set has no such icon, or an alias turns in a way that is not a mirror image.
    """
    mirrored, seen = False, set()
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or name in seen:
            raise BrokenPicture(f"An icon's name must be in its set. Received: {name!r}.")
        if set(alias) - {"parent", "hFlip", "hidden"}:
            raise BrokenPicture(f"An alias may only mirror its parent. Received: {name!r}: {alias}.")
        seen.add(name)
        mirrored ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    body = icon["body"]
    if mirrored:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def render(svg: str) -> np.ndarray:
    """Draws an SVG document on white.

    Args:
        svg: a whole SVG document.

    Returns:
        uint8 (SIZE, SIZE, 3).

    Raises:
        BrokenPicture: it does not parse, or nothing is drawn.
    """
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, background="#ffffff", width=SIZE, height=SIZE, skip_system_fonts=True
        )
    except ValueError as error:
        raise BrokenPicture(f"An SVG must parse. Received: {error}.") from error
    image = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB"))
    if image.shape != (SIZE, SIZE, 3) or image.min() == 255:
        raise BrokenPicture(f"A picture must be {SIZE} x {SIZE} and not blank. Received: shape {image.shape}.")
    return image


def read_json(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_annotations(output: pathlib.Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """CLDR's English short names and keywords.

    Args:
        output: the recipe's data directory, fetched.

    Returns:
        Code points -> (short name, keywords).
    """
    plain = fetch.package_directory(fetch.ANNOTATIONS, output) / "annotations/en/annotations.json"
    derived = fetch.package_directory(fetch.DERIVED_ANNOTATIONS, output) / "annotationsDerived/en/annotations.json"
    entries = {
        **read_json(plain)["annotations"]["annotations"],
        **read_json(derived)["annotationsDerived"]["annotations"],
    }
    return {
        codepoints_of(text): (entry["tts"][0], tuple(entry.get("default", ())))
        for text, entry in entries.items()
        if "tts" in entry
    }


def fully_qualified() -> dict[str, tuple[str, ...]]:
    """The fully qualified emoji of the `emoji` package, with its English names.

    Returns:
        Code points -> names, the first of them the short name of Unicode's emoji-test.txt without "flag: ".

    Raises:
        RuntimeError: another version of the package is installed, so that the counts would be others.
    """
    if emoji.__version__ != EMOJI_VERSION:
        raise RuntimeError(f"The recipe needs emoji=={EMOJI_VERSION}. Received: emoji=={emoji.__version__}.")
    return {
        codepoints_of(text): tuple(
            name.strip(":").replace("_", " ")
            for name in (entry["en"], *entry.get("alias", ()))
            if not re.fullmatch(r":u[0-9a-f]{4}:", name)
        )
        for text, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }


def letters(name: str) -> str:
    """The letters and digits of a name, for telling two spellings of one name from two names."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return "".join(c for c in plain if c.isalnum())


def spelled_as_cldr(name: str) -> str:
    """A name of the `emoji` package with CLDR's colon before a skin tone, for emoji that are newer than CLDR 48."""
    return re.sub(r" ((?:medium-)?(?:light|dark)|medium) skin tone$", r": \1 skin tone", name)


def make_records(output: pathlib.Path) -> tuple[list[Record], list[str]]:
    """Lists every picture that the packages hold, without drawing it.

    Args:
        output: the recipe's data directory, fetched.

    Returns:
        The records sorted by style and code points, and the name of each one's icon.
    """
    names_of, annotations = fully_qualified(), read_annotations(output)
    icon_of = {}
    for style, package in fetch.STYLES.items():
        chars = read_json(fetch.package_directory(package, output) / "chars.json")
        for codepoints, icon in chars.items():
            # As chars.json writes them: its zero-padded "00a9", "00ae" and "0030-20e3" (copyright, registered and the
            # keycaps) are not in the table and stay out; the judged gallery has 10,742 pairs without them.
            codepoints = "-".join(c for c in codepoints.split("-") if c != VARIATION)
            if codepoints in names_of:
                icon_of[style, codepoints] = icon
    styles_of = collections.defaultdict(list)
    for style, codepoints in icon_of:
        styles_of[codepoints].append(style)
    records = []
    for style, codepoints in sorted(icon_of):
        names = names_of[codepoints]
        name, keywords = annotations.get(codepoints, (spelled_as_cldr(names[0]), ()))
        records.append(
            Record(
                style=style,
                codepoints=codepoints,
                group=base_group(codepoints),
                name=name,
                keywords=keywords,
                aliases=tuple(n for n in names if letters(n) not in ("", letters(name))),
                held_out=held_out(codepoints, style, styles_of),
                validation=is_validation(codepoints, style, styles_of),
            )
        )
    return records, [icon_of[r.style, r.codepoints] for r in records]


def summarize(records: Iterable[Record], left_out: Mapping[str, str]) -> dict:
    """Counts of a gallery.

    Args:
        records: what was rendered.
        left_out: "STYLE/CODEPOINTS" -> why it was not.

    Returns:
        A dictionary for summary.json.
    """
    records = list(records)
    styles_of = collections.Counter(r.codepoints for r in records)
    return {
        "pictures": len(records),
        "by_style": dict(collections.Counter(r.style for r in records)),
        "emoji": len(styles_of),
        "emoji_in_every_style": sum(n == len(fetch.STYLES) for n in styles_of.values()),
        "groups": len({r.group for r in records}),
        "held_out": sum(r.held_out for r in records),
        "validation": sum(r.validation for r in records),
        "left_out": dict(left_out),
    }


def write_shards(output: pathlib.Path, records: list[Record]) -> None:
    """Writes the gallery's pictures with captions, by their part of the split; to train on, those of few twice."""
    counts = collections.Counter(r.group for r in records if not (r.held_out or r.validation))

    def examples(chosen: Iterable[Record]):
        for record in chosen:
            picture = (output / "gallery" / record.style / f"{record.codepoints}.png").read_bytes()
            once = record.held_out or record.validation or counts[record.group] >= MANY
            for showing in range(1 if once else 2):
                yield picture, [training_caption(record, f"{showing}/{i}") for i in range(CAPTIONS)]

    write_array_record(output / "train.array_record", examples(r for r in records if not (r.held_out or r.validation)))
    write_array_record(output / "validation.array_record", examples(r for r in records if r.validation))
    write_array_record(output / "held_out.array_record", examples(r for r in records if r.held_out))


def build(output: pathlib.Path) -> dict:
    """Renders everything and writes gallery, shards, index and summary.

    Args:
        output: the recipe's data directory, fetched.

    Returns:
        The summary, as written.
    """
    records, icons = make_records(output)
    sets = {s: read_json(fetch.package_directory(p, output) / "icons.json") for s, p in fetch.STYLES.items()}
    kept, left_out = [], {}
    for record, icon in zip(records, icons, strict=True):
        path = output / "gallery" / record.style / f"{record.codepoints}.png"
        try:
            image = render(svg_document(sets[record.style], icon))
        except BrokenPicture as error:
            left_out[f"{record.style}/{record.codepoints}"] = str(error)
            path.unlink(missing_ok=True)
            continue
        kept.append(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    write_shards(output, kept)
    write_index(output / "index.jsonl", kept)
    summary = summarize(kept, left_out)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/emoji"))
    print(json.dumps(build(parser.parse_args().output), indent=2))


if __name__ == "__main__":
    main()
