"""Ray clusters on Kubernetes, by the KubeRay operator: what is asked of them, and how to talk to them.

- `options`: the words of a cluster file (`backend: {name: kuberay, ...}`);
- `names`, `pods`, `render`: from a plan to the objects that are sent; pure, offline, the same bytes every time;
- `verbs` and what is below it: the network.

The operator's own retries are off everywhere: a run's budget for failures is dtrain's, and is counted once.
"""
