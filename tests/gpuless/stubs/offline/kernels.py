"""The package `kernels` without a network."""


def get_kernel(repo_id: str, *, version: int) -> None:
    """What is raised where the hub cannot be reached."""
    raise ValueError(f"Kernel repository '{repo_id}' could not verify publisher trust status.")
