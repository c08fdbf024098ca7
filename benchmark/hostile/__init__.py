"""What strangers may send: broken HTTP, senseless requests, noise on both planes, and no patience.

`python -m benchmark.hostile` needs no model. Everything goes to loopback and ends by itself, and a
seed repeats it.
"""
