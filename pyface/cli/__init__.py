"""The command line: ``pyface VERB``, one file per verb."""
