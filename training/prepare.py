"""Makes pre-tokenised shards: `python training/prepare.py --profile cpu --text book.txt --out shards`.

Small version: `python training/prepare.py --profile cpu-smoke --out /tmp/shards` (docstrings of the profile's packages,
about half a minute). A profile then trains on them with `data.source = "shards"` and `data.shards = "/tmp/shards"`.
Without --text the documents are those of the profile: docstrings, or a Hugging Face dataset, streamed. Ctrl-C or a
kill loses at most one shard; the same command goes on. Exit status: 0 done, 2 wrong usage, 3 failed, 4 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import itertools
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.errors import AsiError, UsageError
from common.process import exit_with_parent
from common.settings import path_argument
from training.data import extract, text_files, tokenizer
from training.data.fits import package_versions, require_vocabulary
from training.data.sharding import UNIT, Document, Plan, make_shards
from training.data.text_files import Side
from training.profiles import Profile, load_profile, profile_names

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    exit_with_parent()
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Make pre-tokenised shards.", epilog=f"profiles: {', '.join(profile_names())}"
    )
    parser.add_argument("--profile", default="cpu-smoke", metavar="NAME", help="its tokenizer, vocabulary and sources")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--text", type=path_argument, nargs="+", default=[], metavar="FILE",
        help="text files, or .jsonl files of objects with a key text, in place of the profile's source",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, metavar="N",
        help=f"tokens from which a shard ends; it ends with a whole unit of {UNIT} documents, so it may hold more",
    )  # fmt: skip
    parser.add_argument(
        "--train-tokens", type=int, metavar="N",
        help="end with the unit that reaches so many (default: all there are)",
    )  # fmt: skip
    parser.add_argument("--heldout-tokens", type=int, default=1_000_000, metavar="N", help="held out at most")
    parser.add_argument(
        "--heldout-one-in",
        type=int,
        default=100,
        metavar="N",
        help="of so many documents, or characters of text files, one is held out (default: 100)",
    )
    parser.add_argument("--near", type=float, default=0.8, metavar="J", help="overlap of near-duplicates; 1: keep them")
    arguments = parser.parse_args(argv)
    try:
        return _run(load_profile(arguments.profile), arguments)
    except AsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on behind the last finished shard", file=sys.stderr)
        return 4


def _run(profile: Profile, arguments: argparse.Namespace) -> int:
    if arguments.workers < 1 or arguments.shard_tokens < 1 or arguments.heldout_one_in < 2:
        raise UsageError("--workers and --shard-tokens must be at least 1, --heldout-one-in at least 2")
    if not 0 < arguments.near <= 1:
        raise UsageError(f"expected --near in (0, 1], got {arguments.near}", "0.8 is usual")
    source, documents = _documents(profile, arguments.text, arguments.heldout_one_in)
    if profile.data.tokenizer == "bpe":
        known = (text for text, side in documents() if side != "heldout")
        first = list(_up_to(known, tokenizer.TRAINING_CHARACTERS))
        made = tokenizer.train(first, profile.model.vocab, profile.tasks.symbols, profile.tasks.wider)
    else:
        made = tokenizer.fetch(profile.data.tokenizer)
    require_vocabulary(profile, tokenizer.count_ids(made))
    plan = Plan(
        source,
        profile.data.tokenizer,
        shard_tokens=arguments.shard_tokens,
        train_tokens=arguments.train_tokens,
        heldout_tokens=arguments.heldout_tokens,
        heldout_one_in=arguments.heldout_one_in,
        near=arguments.near if arguments.near < 1 else None,
        workers=arguments.workers,
    )
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("tokenising", total=arguments.train_tokens, text="")

        def show(read: int, tokens: int) -> None:
            progress.update(task, completed=tokens, text=f"{read:,} documents, {tokens:,} tokens")

        manifest = make_shards(plan, documents(), made.to_str(), arguments.out, show)
    tokens = sum(shard["tokens"] for shard in manifest["train"])
    print(
        f"{arguments.out}: {len(manifest['train'])} shards, {tokens:,} training and {manifest['heldout']['tokens']:,} "
        f"held-out tokens of {manifest['vocab']:,} ids"
    )
    return 0


def _documents(
    profile: Profile, files: Sequence[Path], one_in: int
) -> tuple[dict[str, Any], Callable[[], Iterator[Document]]]:
    """(What they are, the documents from the beginning).

    Docstrings are held out by package, as the sandbox mounts the others, and text by whole files or their ends.
    """
    if files:
        sizes = {str(path): _size(path) for path in files}
        plain = [path for path in files if path.suffix != ".jsonl"]
        listed = [path for path in files if path.suffix == ".jsonl"]
        # How text is split was another way once: what was begun so cannot be gone on with.
        source = {"text": sizes, **({"held out": "files or ends"} if plain else {})}
        return source, lambda: itertools.chain(text_files.documents(plain, one_in), *map(_of_list, listed))
    data = profile.data
    if data.source == "docstrings":
        versions = package_versions(data)
        sides: list[tuple[Side, str]] = [("heldout", name) for name in data.heldout]
        sides += [("train", name) for name in data.train]
        return {"packages": {name: versions[name] for _, name in sides}}, lambda: (
            (text, side) for side, name in sides for text in extract.docstrings(name)
        )
    if data.source == "fineweb":
        from training.data.hub import HubDataset

        return {"dataset": data.dataset}, lambda: ((text, None) for text in HubDataset(data.dataset).texts())
    raise UsageError(f"profile {profile.name} trains on shards already", "name text files with --text")


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"cannot read the text file {path}: {error.strerror}", "name readable files") from error
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"cannot read the text file {path}: expected a regular file", "name readable files")
    return found.st_size


def _of_list(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise _no_document(path, number, str(error)) from error
            if not isinstance(text, str):
                raise _no_document(path, number, f"its text is {type(text).__name__}")
            yield text, None


def _no_document(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{path}, line {number}: expected a JSON object with a text under the key text: {why}", "correct the line"
    )


def _up_to(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


if __name__ == "__main__":
    sys.exit(main())
