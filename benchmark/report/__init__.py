"""From files of results to tables, plots, pages, and the figures of the README.

In: ``results.csv`` and ``absent.csv`` of each device (:mod:`benchmark.results`). Out: a page and
PNG plots beside them, blocks of the README. Run as ``python -m benchmark.report``. The same files
give the same pages, letter by letter.
"""
