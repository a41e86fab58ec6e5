"""Verbs put together: choosing a merge by what it scores."""

from sparselet.study.search import SearchResult, SearchSettings, Trial, search

__all__ = ["SearchResult", "SearchSettings", "Trial", "search"]
