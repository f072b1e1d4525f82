"""From the form that a request asks for to an automaton over tokens."""
