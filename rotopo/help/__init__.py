"""What ``rotopo`` says of itself: help, lists of what there is, shell completion, versions.

All of it comes from :mod:`rotopo.described`, so that it is there before torch is imported.

- ``command.py``: which page a command line asks for.
- ``pages.py``: the page of a command, and that of all of them.
- ``classes.py``: the settings of a class, and the classes that a setting takes.
- ``lists.py``: objectives, formats of rows, callbacks.
- ``completion.py``: what a shell may put behind a command line.
- ``settings.py``: from a setting's name with dots to what is described of it.
- ``layout.py``: lines of 80 columns.
"""
