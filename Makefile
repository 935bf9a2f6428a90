.PHONY: test gate nightly

test: ; pytest
gate: ; .ci/run
nightly: ; .ci/nightly
