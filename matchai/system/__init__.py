"""What all other wings use: errors, whole files, locks, the terminal, processes and stop signals, memory, threads."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.system import machine
    from matchai.system.command import INTERRUPTED, MISTAKE, print_problems, run_command
    from matchai.system.console import Display, StudyDisplay, best_line, epoch_line, show_evaluation
    from matchai.system.errors import FailedError, InputError, LockLostError, Problems, StoppedError, StoreError, plural
    from matchai.system.failures import (
        device_message, is_lost_process, is_out_of_memory, is_sticky, lost_process_message,
    )
    from matchai.system.files import (
        HostLocks, alone, file_name, format_size, is_there, list_folder, lock_bytes, make_folder, sync_file,
        sync_folder, walk_files, write_whole,
    )
    from matchai.system.lazy import lazy_exports
    from matchai.system.machine import (
        HALF_DTYPES, choose_precision, cpu_has_bf16, default_workers, keep_heap, num_cores, num_local_processes,
        preparing_threads, set_threads,
    )
    from matchai.system.optional_packages import need
    from matchai.system.output import printable
    from matchai.system.peers import share_error, watching_peers
    from matchai.system.processes import (
        StopSignal, any_process, check_agreement, check_launch, decide, end_with_launcher, end_with_parent,
        is_set_by_launcher, join_group, launcher, leave_group, num_processes, num_restarts,
    )
    from matchai.system.random_keys import seed_sequence
    from matchai.system.thread_waits import choose_waiting, refuse_launch
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "HALF_DTYPES", "INTERRUPTED", "MISTAKE", "Display", "FailedError", "HostLocks", "InputError", "LockLostError",
    "Problems", "StopSignal", "StoppedError", "StoreError", "StudyDisplay", "alone", "any_process", "best_line",
    "check_agreement", "check_launch", "choose_precision", "choose_waiting", "cpu_has_bf16", "decide",
    "default_workers", "device_message", "end_with_launcher", "end_with_parent", "epoch_line", "file_name",
    "format_size", "is_lost_process", "is_out_of_memory", "is_set_by_launcher", "is_sticky", "is_there", "join_group",
    "keep_heap", "launcher", "lazy_exports", "leave_group", "list_folder", "lock_bytes", "lost_process_message",
    "machine", "make_folder", "need", "num_cores", "num_local_processes", "num_processes", "num_restarts", "plural",
    "preparing_threads", "print_problems", "printable", "refuse_launch", "run_command", "seed_sequence", "set_threads",
    "share_error", "show_evaluation", "sync_file", "sync_folder", "walk_files", "watching_peers", "write_whole",
]
