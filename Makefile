# make train: environment, simulated recordings, training, evaluation, pictures
# make test: the tests; make soak: the long ones
PYTHON ?= python3
PY = .venv/bin/python

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tests: .venv/done  # the tests also read vendor formats, write mp4, and score by pycocotools
	$(PY) -m pip install --quiet --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0 pycocotools==2.0.11 \
		faery==0.7.1 imageio-ffmpeg==0.8.1
	touch $@

.PHONY: train test soak
train: .venv/done
	$(PY) train.py configs/toy.py --init_from=$(if $(wildcard out_toy/ckpt.pt),resume,scratch)
	$(PY) eval.py --ckpt out_toy/best.pt --split=test
	@echo "Look at out_toy/curves.png and out_toy/eval/. Next: README.md, 'Your own data', or change a line in configs/toy.py."

test: .venv/tests  # one thread each: two torch processes with more of them slow each other down
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -n 2 --dist worksteal test_*.py

soak: .venv/tests
	SOAK=1 $(PY) -m pytest -q -rs test_*.py -k 'fifty or twenty_thousand'
