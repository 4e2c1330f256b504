# make train: environment, simulated recordings, training, evaluation, a real clip, pictures
# make ablation: the notes' experiments at the toy's size
# make test: all tests; make soak: the long ones; make lint: unused names, import order, line length
PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/tests: .venv/done requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

.PHONY: train ablation test soak lint
train: .venv/done
	$(PY) train.py configs/toy.py --init_from=$(if $(wildcard out_toy/ckpt.pt),resume,scratch)
	$(PY) eval.py --ckpt out_toy/best.pt --split=test --score='obj*cls'
	$(PY) prepare.py --src=real/parramatta --dst=datasets/parramatta --dataset=etram \
		--box_filter=none --downsample=none
	$(PY) eval.py --ckpt out_toy/best.pt --data_dir=datasets/parramatta --out_dir=out_toy/real \
		--score='obj*cls'
	$(PY) demo.py --ckpt out_toy/best.pt --recording real/parramatta/test/parramatta_td.h5 \
		--out out_toy/real/parramatta.gif
	@echo "Look at out_toy/curves.png, out_toy/eval/ and out_toy/real/. Next: README.md, 'Your own"
	@echo "data', or change a line in configs/toy.py and train with another --out_dir."

ablation: .venv/done
	$(PY) ablation.py

test: .venv/tests  # one thread each: two torch processes with more slow each other down
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -n 2 --dist worksteal test_all.py test_faults.py

soak: .venv/tests
	SOAK=1 $(PY) -m pytest -q -rs test_faults.py -k 'fifty or twenty_thousand'

lint: .venv/tests
	$(PY) -m ruff check .
