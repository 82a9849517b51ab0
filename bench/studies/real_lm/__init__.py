"""What ways of quantizing cost a language model with real weights: divergence, perplexity, minutes.

    python -m bench.studies real-lm texts --out out/real     # calib.jsonl and held.jsonl, of Python code found here
    python -m bench.studies real-lm measure --model DIR --out out/real --minutes 9
    python -m bench.studies real-lm table --out out/real     # results.json becomes README.md

`measure` can be stopped and called again: what results.json has is not measured twice, and nothing is begun that would
end after the limit. A checkpoint is removed once it is measured.

texts: what is read. ways: settings by name. score: two models over the same tokens. study: the loop. page: the table.
"""
