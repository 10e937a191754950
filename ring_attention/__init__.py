# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention over sequences sharded across the ranks of a process group."""
