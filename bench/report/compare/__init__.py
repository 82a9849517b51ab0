"""How systems of several reports compare with the first.

figures names what a report holds of a system; changes says how a figure moved, with its interval; conditions reads and
judges what counts as a regression; differences finds what makes two reports incomparable or should be known;
comparison puts them together. view is what a reader sees of it; html_file, markdown and terminal lay that out.
"""
