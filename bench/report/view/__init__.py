"""What the reader of a report sees, said once: headings, rows, cells and sentences as text.

whole is all of it, in parts: cards (the numbers at the top), accuracy, fidelity, speed, sizes, workload; cells are
figures with their intervals. `bench.report.render` lays it out as markdown, HTML and in the terminal, and adds nothing
but plots.
"""
