"""A report as files and in the terminal: layouts of `bench.report.view`, one output format a module.

json_file writes and reads report.json, which all else can be made of again. markdown is report.md, terminal what the
command line prints, html_file report.html with its plots (plots); pages fills the templates (*.j2), which the page of
a comparison uses too.
"""
