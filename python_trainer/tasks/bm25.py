"""Search by BM25: what the families that have a search engine share."""

from __future__ import annotations

import bm25s
import numpy as np


class BM25:
    """Texts as lists of words; equal scores keep their order."""

    def __init__(self, texts: list[list[str]]) -> None:
        self._index = bm25s.BM25()  # its default scoring is Lucene's
        self._index.index(texts, show_progress=False)

    def best(self, words: list[str], k: int) -> list[int]:
        """At most `k` of the texts that share a word with the query, best first."""
        ids = self._index.get_tokens_ids(words)
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        found = np.flatnonzero(scores > 0)
        return found[np.argsort(-scores[found], kind="stable")[:k]].tolist()
