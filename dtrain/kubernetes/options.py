"""The words of a cluster file for Kubernetes, grouped by what they are about. Depends on the file alone."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from dtrain.machine import MachineSpec
from dtrain.settings import PositiveInt, Says, Settings
from dtrain.storage import is_remote

ObjectName = Annotated[
    str,
    Meta(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z"),
    Says("a name of a-z, 0-9, - and ., as Kubernetes has them"),
]
ClusterName = Annotated[
    str,
    Meta(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?\Z"),
    Says("at most 47 of a-z, 0-9 and -, beginning with a letter"),
]
LabelValue = Annotated[
    str,
    Meta(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z"),
    Says("text of at most 63 letters, digits, -, _ and . (in quotes where it looks like a number or true)"),
]
Amount = (
    Annotated[int, Meta(ge=0)]
    | Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?\Z"), Says("text such as 5120Mi")]
)
Gib = Annotated[float, Meta(gt=0, le=100_000)]
AbsolutePath = Annotated[str, Meta(pattern=r"^/[^:\x00]*\Z", max_length=1024), Says("an absolute path")]
Deadline = Annotated[int, Meta(gt=0, le=2**31 - 1)]
RAY_VERSION = "2.60.0"
"""The one in constraints.txt, which images are built with."""


class Toleration(Settings):
    """A taint of nodes that pods put up with."""

    key: Annotated[str, Meta(min_length=1, max_length=317)]
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether any value is put up with, or one."""
    value: LabelValue | None = None
    """The value, with `operator: Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; any when left out."""

    def __post_init__(self) -> None:
        if (self.value is not None) != (self.operator == "Equal"):
            raise ValueError("a value goes with operator: Equal, and Exists has none")


class Placement(Settings):
    """On which nodes pods may be."""

    node_selector: dict[str, LabelValue] = {}
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that are put up with."""
    overlay: dict[str, Any] = {}
    """What no key here says, laid on the pod's spec as Kubernetes writes it: mappings merge, named things (containers,
    volumes) by name, and other lists grow."""


class Head(Placement):
    """The pod of Ray's head: it drives the run and has no workers and no GPUs."""

    cores: Annotated[float, Meta(gt=0, le=256)] = 2.0
    """Cores of the pod."""
    memory_gib: Gib = 8.0
    """Memory of the pod in GiB."""


class Worker(Placement):
    """Pods that train: one on each node, with all that the run uses there."""

    gpu_resource: Annotated[str, Meta(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+\Z")] = "nvidia.com/gpu"
    """What the nodes call a GPU."""
    shm_gib: Gib | None = None
    """Size of /dev/shm in GiB, part of the pod's memory; the snapshot of a run's state lies there. Half of the memory
    when left out."""
    object_store_gib: Gib = 2.0
    """Share of /dev/shm for Ray's objects, which training does not need, and `data: {name: ray_data}` does."""
    scratch_gib: Gib | None = None
    """Disk of the node to set aside for /tmp, where checkpoints wait until they are in storage; none when left out."""
    spot: bool = False
    """The nodes may be taken away at any time (their label and taint are for `node_selector` and `tolerations`); Ray is
    told so."""
    spread: Literal["any", "prefer", "require"] = "prefer"
    """Whether the pods of a run must be on nodes of their own."""
    near: Annotated[str, Meta(min_length=1, max_length=317)] | None = None
    """Label of nodes whose value all workers should share, such as `topology.kubernetes.io/zone`; preferred, not
    required."""
    runtime_class: ObjectName | None = None
    """RuntimeClass of the pods, where GPUs need one."""


class Network(Settings):
    """What workers talk over."""

    resources: dict[str, Amount] = {}
    """What a pod asks for to get at the fabric, such as `{vpc.amazonaws.com/efa: 32}`; asked for by runs on several
    nodes only."""
    env: dict[str, str] = {}
    """Environment variables of workers for NCCL and the fabric below it."""
    lock_memory: bool = False
    """Let workers lock memory (capability IPC_LOCK), as RDMA does. The namespace must admit it; and as pods are not
    root, the nodes must not limit it (`ulimit -l unlimited` of their container runtime)."""
    isolate: bool = True
    """Send a NetworkPolicy along that lets the pods of a run talk to each other; for clusters that forbid the rest."""


class Volume(Settings):
    """A folder that every pod sees."""

    mount: AbsolutePath
    """Where it is in the pods."""
    claim: ObjectName | None = None
    """PersistentVolumeClaim that holds it; several nodes need one that is ReadWriteMany."""
    host_path: AbsolutePath | None = None
    """Folder of the nodes that holds it, the same everywhere: one that they share, or that is read only."""
    secret: ObjectName | None = None
    """Secret whose keys are its files."""
    read_only: bool = False
    """Let nobody write to it; a Secret never can be."""

    def __post_init__(self) -> None:
        if [self.claim, self.host_path, self.secret].count(None) != 2:
            raise ValueError("give one of claim, host_path and secret")


class Security(Settings):
    """As whom pods run. They are never privileged, gain no privileges and have no capabilities."""

    user: Annotated[PositiveInt, Meta(lt=2**31)] = 1000
    """User id, never root; the image's own is 1000."""
    group: Annotated[PositiveInt, Meta(lt=2**31)] = 1000
    """Group id, which volumes are made writable for."""
    read_only_root: bool = True
    """Keep the image as it is: only /tmp, /dev/shm and volumes can be written to."""


class Auth(Settings):
    """Who may use the Ray cluster of a run: its dashboard, its jobs."""

    mode: Literal["token", "disabled"] = "token"
    """Whether a token is asked for."""
    secret: ObjectName | None = None
    """Secret that holds it as `auth_token`; the operator makes one when left out."""


class Queue(Settings):
    """Kueue: runs are created suspended, and start when it admits them."""

    name: ObjectName
    """LocalQueue of the namespace."""
    priority_class: ObjectName | None = None
    """WorkloadPriorityClass, by which it orders and preempts."""


class Gang(Settings):
    """A scheduler that places all pods of a run at once or none, which the operator must know of."""

    scheduler: Literal["volcano", "yunikorn"]
    """Which one."""
    queue: Annotated[str, Meta(min_length=1, max_length=253)] | None = None
    """Its queue; its default queue when left out."""


class Autoscaling(Settings):
    """Ray asks for nodes when they are needed and gives them back when idle; a fixed number when left out."""

    min_nodes: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Nodes that are kept."""
    max_nodes: Annotated[PositiveInt, Meta(le=100_000)]
    """Most nodes; a run gets those it needs in any case."""
    idle_timeout_s: Deadline = 300
    """Seconds for which a node has to be idle before it is given back."""
    service_account: ObjectName | None = None
    """Account of the head's pod, which changes the size of its cluster; the operator makes one when left out."""

    def __post_init__(self) -> None:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than max_nodes {self.max_nodes}")


class GcsFaultTolerance(Settings):
    """Keep what Ray's head knows in Redis, so that workers outlive the head's pod."""

    redis_address: Annotated[str, Meta(pattern=r"^rediss?://[^\s]+\Z|^[^\s:/]+:[0-9]+\Z", max_length=1024)]
    """Where Redis answers, such as `redis://dtrain-redis.dtrain.svc:6379`."""
    password_secret: ObjectName | None = None
    """Secret that holds its password."""
    password_key: Annotated[str, Meta(pattern=r"^[-._a-zA-Z0-9]+\Z")] = "password"  # noqa: S105 -- a key
    """Key of the password in that Secret."""


class Standing(Settings):
    """A Ray cluster that stays, and that runs share."""

    name: ClusterName
    """Its name; `dtrain cluster up` makes it where there is none."""
    nodes: Annotated[PositiveInt, Meta(le=100_000)] = 1
    """Nodes that train in it, when `dtrain cluster up` makes it."""


class KubeRay(Settings):
    """A Kubernetes cluster with the KubeRay operator: each run brings a Ray cluster of its own, which goes with it."""

    machine: MachineSpec
    """What each node that trains has for a run."""
    image: Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"^\S+\Z")]
    """Image of every pod: dtrain, Ray and torch (`clusters/image/` makes one)."""
    namespace: ObjectName = "default"
    """Namespace of everything."""
    context: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    """Context of the kubeconfig; the current one when left out."""
    kubeconfig: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    """Path of the kubeconfig; $KUBECONFIG, ~/.kube/config or the pod's own account when left out."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When nodes ask the registry for the image."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets that open the registry."""
    ray_version: Annotated[str, Meta(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+\Z")] = RAY_VERSION
    """Ray in the image."""
    service_account: ObjectName | None = None
    """Account of the pods: what storage knows them by. The namespace's default when left out."""
    head: Head = Head()
    """The pod of Ray's head: it drives the run and has no workers and no GPUs."""
    worker: Worker = Worker()
    """Pods that train: one on each node, with all that the run uses there."""
    env: dict[str, str] = {}
    """Environment variables of every pod."""
    env_from: tuple[ObjectName, ...] = ()
    """Secrets whose keys are environment variables of every pod."""
    volumes: tuple[Volume, ...] = ()
    """Folders that every pod sees."""
    network: Network = Network()
    """What workers talk over."""
    security: Security = Security()
    """As whom pods run. They are never privileged, gain no privileges and have no capabilities."""
    auth: Auth = Auth()
    """Who may use the Ray cluster of a run: its dashboard, its jobs."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods."""
    queue: Queue | None = None
    """Kueue: runs are created suspended, and start when it admits them."""
    gang: Gang | None = None
    """A scheduler that places all pods of a run at once or none, which the operator must know of."""
    autoscaling: Autoscaling | None = None
    """Ray asks for nodes when they are needed and gives them back when idle; a fixed number when left out."""
    gcs_fault_tolerance: GcsFaultTolerance | None = None
    """Keep what Ray's head knows in Redis, so that workers outlive the head's pod."""
    standing: Standing | None = None
    """A Ray cluster that stays, and that runs share; each run brings its own when left out."""
    pending_deadline_s: Deadline = 1800
    """Longest wait in seconds for nodes and images, once a queue has let the run in."""
    active_deadline_s: Deadline | None = None
    """Longest time in seconds that a run may take in all; without end when left out."""
    ttl_after_finished_s: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 60
    """Seconds for which nodes are kept after the end; logs and checkpoints are in storage."""
    termination_grace_s: Deadline = 120
    """Seconds that a pod has to write a last checkpoint when its node is taken away."""
    labels: dict[str, LabelValue] = {}
    """More labels for everything that is sent."""
    annotations: dict[str, str] = {}
    """More annotations for everything that is sent."""

    def __post_init__(self) -> None:
        if self.queue and self.gang:
            raise ValueError("queue (Kueue) and gang both decide when a run starts; keep one of the two")
        if self.queue and self.autoscaling:
            raise ValueError("Kueue counts a fixed number of nodes; remove queue or autoscaling")
        for key, value in (("queue", self.queue), ("gang", self.gang)):
            if value and self.standing:
                raise ValueError(f"{key} is for runs that bring their own nodes; remove {key} or standing")
        shm = self.worker.shm_gib or self.machine.memory_gib / 2
        if shm >= self.machine.memory_gib:
            raise ValueError(
                f"worker.shm_gib {shm:g} is part of the pod's memory, and machine.memory_gib is"
                f" {self.machine.memory_gib:g}; give at most three quarters of it"
            )
        if self.worker.object_store_gib >= shm:
            raise ValueError(
                f"worker.object_store_gib {self.worker.object_store_gib:g} fills /dev/shm of {shm:g} GiB;"
                f" give at most {shm / 4:g}"
            )

    def check_nodes(self, nodes: int) -> None:
        """Raises `ValueError` for more nodes than a run can get."""
        if self.standing is None:
            return
        most = self.autoscaling.max_nodes if self.autoscaling is not None else self.standing.nodes
        if nodes > most:
            key = "autoscaling.max_nodes" if self.autoscaling is not None else "standing.nodes"
            raise ValueError(f"{nodes} is more than the {most} of backend.{key}: a run would wait for ever")

    def check_storage(self, storage: str) -> None:
        """Raises `ValueError` for a folder that pods do not see."""
        if is_remote(storage):
            return
        mounts = [volume for volume in self.volumes if _is_below(storage, volume.mount)]
        if not mounts:
            raise ValueError(
                f"{storage!r} is a folder that no pod sees; give a bucket (s3://bucket/runs), or a folder below the"
                " mount of one of backend.volumes"
            )
        if mounts[0].read_only or mounts[0].secret is not None:
            raise ValueError(f"{storage!r} is below {mounts[0].mount}, which cannot be written to")


def _is_below(path: str, folder: str) -> bool:
    folder = folder.rstrip("/")
    return path == folder or path.startswith(f"{folder}/")
