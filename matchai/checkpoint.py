"""The files of a run: its best weights and its resumable state, to read in a program of your own."""

from matchai.training import State, load_about, load_state, load_weights

__all__ = ["State", "load_about", "load_state", "load_weights"]
