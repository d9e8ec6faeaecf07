"""That a peer opens something without a word."""

import logging
import warnings


class Silence:
    """No warning of Python's, and no line in the log of diffusers or transformers at warning or above."""

    def __enter__(self):
        self.lines = []
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.lines.append(record.getMessage())
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).addHandler(self.handler)
        return self

    def __exit__(self, *error):
        self.caught.__exit__(*error)
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(self.handler)
        # transformers' remark about an image processor that diffusers imports and nobody here uses.
        lines = [line for line in self.lines if "requires torchvision" not in line]
        assert error[0] is not None or lines == []
