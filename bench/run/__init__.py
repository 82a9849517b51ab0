"""One `qvl bench`, from its settings to what was measured.

config is what it was told, with presets as files; asked, the questions and items; session has servers booted (boot),
meets the systems and hands over an outcome; measure has the phases: answers (questions, fidelity) and speed (loads), on
what running and progress hold; measured, loads and systems are the plain types of what comes out; journal keeps it as
it comes, so that an interrupted run goes on.
"""
