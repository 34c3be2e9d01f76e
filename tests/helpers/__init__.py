"""What several test files share. Tests import it as `helpers`, and no test imports another.

`devices`: meshes, and what moves in a compiled program. `transforms`: every mode of differentiation. `memory`,
`rounding`, `native`: short. `flax_rules`: what the tests of layers share. `compiled`: programs for absent hardware;
skip it unless a test of those fails.
"""
