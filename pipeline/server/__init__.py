"""Serves bundles over HTTP: merges the texts of many clients, and answers on routes they know.

May import: `text`, `loading`, `base`, `families`. Needs the packages of the extra `serve`.
"""
