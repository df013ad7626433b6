"""OpenWebText (54 GB of text, 9 B tokens), streamed through the `datasets` package: the text is neither stored nor held in memory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare import hugging_face_documents, prepare_from_command_line


def add_arguments(parser):
    parser.add_argument("--source", default="Skylion007/openwebtext", help="dataset, or a local folder of it (default: %(default)s)")


if __name__ == "__main__":
    prepare_from_command_line(
        __doc__, Path(__file__).parent, add_arguments, lambda arguments: hugging_face_documents(arguments.source, None)
    )
