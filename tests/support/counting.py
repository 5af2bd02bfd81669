"""What a rank hands to collectives."""

import contextlib

from sharded_adadiag.comm.collectives import ProcessGroup


class Counted:
    """Counts the collectives of one rank and the bytes it hands to them."""

    def __init__(self):
        self.calls, self.bytes = 0, 0

    @contextlib.contextmanager
    def watching(self, monkeypatch):
        to_all, to_sum = ProcessGroup.start_all_to_all, ProcessGroup.all_reduce_sum_
        to_max = ProcessGroup.all_reduce_max_

        def start_all_to_all(comm, target, source, received, sent):
            self.count(comm, source.nbytes)
            return to_all(comm, target, source, received, sent)

        def all_reduce_sum_(comm, tensor):
            self.count(comm, tensor.nbytes)
            to_sum(comm, tensor)

        def all_reduce_max_(comm, tensor):
            self.count(comm, tensor.nbytes)
            to_max(comm, tensor)

        with monkeypatch.context() as patch:
            patch.setattr(ProcessGroup, "start_all_to_all", start_all_to_all)
            patch.setattr(ProcessGroup, "all_reduce_sum_", all_reduce_sum_)
            patch.setattr(ProcessGroup, "all_reduce_max_", all_reduce_max_)
            yield

    def count(self, comm, size):
        if comm.rank == 1:
            self.calls += 1
            self.bytes += size
