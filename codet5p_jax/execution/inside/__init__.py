"""What runs in the sandbox: the standard library and nothing else.

In there no codet5p_jax is installed; this folder alone is visible, as a package
of its own named `inside`. So its modules import each other relatively, and a
test holds them to the standard library.
"""
