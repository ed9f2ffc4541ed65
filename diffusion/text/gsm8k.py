"""The GSM8K training set, fetched once from its repository and known by its hash (Cobbe et al. 2021, MIT licence)."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

from circuits.files import file_hash, replace_file
from diffusion.errors import CorpusError

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl"
SHA256 = "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
FIELD = "answer"
LICENCE = """\
MIT License

Copyright (c) 2021 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
"""Of GSM8K."""
_WAY_OUT = (
    "get grade_school_math/data/train.jsonl of the repository openai/grade-school-math, and name it: --corpus PATH"
)


def cached_path() -> Path:
    """Return where the file is kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "unfactor" / "gsm8k-train.jsonl"


def gsm8k_train(*, url: str = URL, timeout: float = 30.0) -> Path:
    """Return the file with the training problems, a JSON object in each line; downloaded where it is not there yet.

    Args:
        url: where from.
        timeout: in seconds, of every wait for the network.

    Raises:
        CorpusError: it cannot be downloaded, or what was downloaded is another file.
    """
    path = cached_path()
    if path.is_file() and file_hash(path) == SHA256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content = response.read()
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus: expected GSM8K from {url}, got no answer ({error}); {_WAY_OUT}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise CorpusError(f"corpus: expected a file with SHA-256 {SHA256} at {url}, got {found}; {_WAY_OUT}")
    with replace_file(path) as temporary:
        temporary.write_bytes(content)
    return path
