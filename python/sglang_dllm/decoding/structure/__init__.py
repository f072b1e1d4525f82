"""Answers of a given form: a programme over positions and states of an automaton."""
