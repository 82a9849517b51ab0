"""How far quantized weights have drifted from their source, without a server: KL divergence on the tokens of answers.

turns: how a template marks answers. answers: which tokens
are answers, what comes out behind the last layer there, and the divergence of two such. paired: what per-answer
divergences say of two candidates. What a served model does is measured by `qvl bench`; this is the arithmetic alone.
"""
