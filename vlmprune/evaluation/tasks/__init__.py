# SPDX-License-Identifier: Apache-2.0
"""What is asked: the drawn task, the tasks of lmms-eval, and the list of both."""
