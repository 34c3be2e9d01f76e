"""What several test files share: devices, programs compiled for absent hardware. Tests import it as `helpers`.

A newcomer may skip `compiled` unless a test of compiled programs fails.
"""
