"""Documents of a Hugging Face dataset, streamed through the `datasets` package: neither stored nor held in memory."""

from pathlib import Path

from runtime.errors import fail


class HuggingFaceDocuments:
    """Texts of a dataset's train split, or of a local folder of parquet or JSON files. `state_dict` holds the position of
    `datasets` in the stream and the dataset's commit (of a local folder, its hash). Resuming opens no file before the position."""

    def __init__(self, source: str, name: str | None):
        self.source, self.is_local, self.position = source, Path(source).is_dir(), None
        self.name = None if self.is_local else name

    def state_dict(self) -> dict:
        return {"commit": self.commit, "stream": self.stream.state_dict()}

    def load_state_dict(self, position: dict):
        self.position = position

    def __iter__(self):
        try:
            import datasets
            from huggingface_hub import constants
            from huggingface_hub.utils import get_session
        except ImportError:
            fail("this dataset comes through the datasets package: pip install datasets")
        datasets.disable_progress_bars()
        commit = self.position["commit"] if self.position else None
        try:
            if self.is_local:
                datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are said below
            else:
                get_session().head(constants.ENDPOINT, timeout=10)  # no network: said at once, not after many retries
            builder = datasets.load_dataset_builder(self.source, self.name, revision=None if self.is_local else commit)
            self.commit = builder.hash
            if commit not in (None, self.commit):
                fail(f"the files of {self.source} have changed since this preparation began: delete its .partial folder to start again")
            self.stream = builder.as_streaming_dataset(split="train")
            if "text" in (self.stream.column_names or ()):  # parquet tells its columns before the first row, JSON does not
                self.stream = self.stream.select_columns(["text"])  # this halves the time
            if self.position:
                self.stream.load_state_dict(self.position["stream"])
            for row in self.stream:
                if not isinstance(row.get("text"), str):
                    fail(f"{self.source} has no column 'text' of strings: its columns are {', '.join(row)}")
                yield row["text"]
        except Exception as error:  # of any of the packages below datasets
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            if self.is_local:
                fail(f"{self.source} cannot be read: {reason}")
            fail(f"{self.source} is not a folder here, and it cannot be streamed: {reason}; check its name and the network")
