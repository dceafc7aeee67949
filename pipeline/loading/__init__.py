"""Loads bundles with what a device has: numpy, ctypes and the standard library, nothing else.

May import: nothing else of Bertile, since a bundle takes these modules along.
"""
