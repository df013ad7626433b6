"""OpenWebText (54 GB of text, 9 B tokens), streamed through the `datasets` package: the text is neither stored nor held in memory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.hugging_face import HuggingFaceDocuments
from data.prepare import prepare_as_told, read_command_line

SOURCE, N_TOKENS = "Skylion007/openwebtext", 9_040_000_000


def add_arguments(parser):
    parser.add_argument("--source", default=SOURCE, help="dataset, or a local folder of parquet or JSON files (default: %(default)s)")


if __name__ == "__main__":
    arguments = read_command_line(__doc__, Path(__file__).parent, add_arguments)
    documents = HuggingFaceDocuments(arguments.source, None)
    prepare_as_told(arguments, documents, arguments.source, N_TOKENS if arguments.source == SOURCE else None)
