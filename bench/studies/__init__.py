"""The measurements behind docs/results; run from a checkout, not installed (``python -m bench.studies --help``).

cli is their command line, settings what each is asked for. agreement (with `vllm bench serve`; timed_server answers it
by the clock), gpu_figures, tuning, step_profile, capacity_check, cold_start, drafts and formats measure servers; with
sharing several are on one card. guard_cost measures the guard. seeded_faults judges faulty_checkpoints. quantizer/
holds the quantizer beside stock AutoAWQ.
"""
