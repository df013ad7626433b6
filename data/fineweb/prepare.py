"""FineWeb, the 10 B token sample, streamed through the `datasets` package; or its published token shards, which are linked."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.hugging_face import HuggingFaceDocuments
from data.partial import finish, move_in, partial_folder
from data.prepare import prepare_as_told, read_command_line
from data.shards import open_dataset
from runtime.errors import fail

SOURCE, N_TOKENS = "HuggingFaceFW/fineweb", 10_400_000_000
GPT2_VOCABULARY = 50_257


def add_arguments(parser):
    parser.add_argument("--source", default=SOURCE, help="dataset, or a local folder of parquet or JSON files (default: %(default)s)")
    parser.add_argument("--from_shards", type=Path, metavar="DIR", help="link the GPT-2 shards published for llm.c and modded-nanogpt")


def link_shards(folder: Path, out: Path):
    """Puts links to the shards of `folder`, if they pass training's checks, and a `meta.json` into `out`."""
    train, val = open_dataset(folder, block_size=1, vocab_size=GPT2_VOCABULARY)
    with partial_folder(out) as partial:
        if (partial / "meta.json").exists():  # killed while it was moved in
            return move_in(partial, out)
        if any(partial.iterdir()):
            fail(f"{partial} holds a part of another preparation: choose another --out, or delete that folder")
        for path in train.paths + val.paths:
            (partial / path.name).symlink_to(path.absolute())
        finish(partial, out, "gpt2", GPT2_VOCABULARY, source=str(folder))


if __name__ == "__main__":
    arguments = read_command_line(__doc__, Path(__file__).parent, add_arguments)
    if arguments.from_shards:
        link_shards(arguments.from_shards, arguments.out)
    else:
        documents = HuggingFaceDocuments(arguments.source, "sample-10BT")
        prepare_as_told(arguments, documents, arguments.source, N_TOKENS if arguments.source == SOURCE else None)
