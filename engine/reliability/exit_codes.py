"""How a rank ends, in a number that its starter, its job and its supervisor read; imports nothing."""

EXIT_CRASH = 1
"""An error of the program, with its traceback."""
EXIT_REFUSED = 2
"""The user can mend it: configuration, data, artifacts, a folder in use."""
EXIT_LOST = 75
"""A rank was lost: dead, stopped, or not come. Nothing is to be mended; starting again may help."""
EXIT_PREEMPTED = 85
"""Stopped because it was asked to; the same command goes on."""
EXIT_INTERRUPTED = 130
"""An interrupt from the keyboard, or a job that was cancelled."""
EXIT_READER_GONE = 141
"""The reader of the standard output went before the program had told all; as shells say it of SIGPIPE."""
