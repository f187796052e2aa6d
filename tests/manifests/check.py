"""Renders kustomizations, checks every object in them against the schemas of Kubernetes, and prints all as JSON.

usage: check.py FOLDER|FILE...      a folder is rendered by `kubectl kustomize`, a file of YAML is only read
Prints {"FOLDER": [OBJECT, ...], ...}; exits with 1 and a line for each problem.
"""

import json
import os
import subprocess
import sys

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37"

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def struct(required, **fields):
    """Just these fields: a misspelled one is an error."""
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
# As Prometheus reads it.
SPAN = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d|w|y)$"}

# What is used of the custom resources, by their definitions (jobset.x-k8s.io/v1alpha2, kueue.x-k8s.io/v1beta2, monitoring.coreos.com/v1): the
# schemas above do not have them. A JobSet's jobs are checked as what they become, objects of batch/v1.
CUSTOM = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): struct(
        ["replicatedJobs"],
        suspend={"type": "boolean"},
        failurePolicy=struct([], maxRestarts={"type": "integer", "minimum": 0}, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}),
        successPolicy=struct(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs={"type": "array", "items": NAME}),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": struct(["name", "template"], name=NAME, replicas={"type": "integer", "minimum": 1}, template={"type": "object"}),
        },
    ),
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): struct(
        ["clusterQueue"], clusterQueue=NAME, stopPolicy={"enum": ["None", "Hold", "HoldAndDrain"]}
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): struct(
        ["selector", "podMetricsEndpoints"],
        selector=struct(["matchLabels"], matchLabels=TEXTS),
        podMetricsEndpoints={"type": "array", "minItems": 1, "items": struct(["port"], port=NAME, path=TEXT, interval=SPAN)},
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): struct(
        ["groups"],
        groups={
            "type": "array",
            "items": struct(
                ["name", "rules"],
                name=TEXT,
                rules={
                    "type": "array",
                    "minItems": 1,
                    "items": struct(["alert", "expr"], alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": SPAN}),
                },
            ),
        },
    ),
}


def problems_of(thing):
    """Yields what is wrong with an object."""
    spec = CUSTOM.get((thing.get("apiVersion"), thing.get("kind")))
    try:
        if spec is None:
            kubernetes_validate.validate(thing, KUBERNETES, strict=True)
            return
        jsonschema.validate(thing["spec"], spec)
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message
        return
    except jsonschema.ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        return
    if thing["kind"] == "JobSet":
        names = [job["name"] for job in thing["spec"]["replicatedJobs"]]
        for target in thing["spec"].get("successPolicy", {}).get("targetReplicatedJobs", []):
            if target not in names:
                yield f"successPolicy names {target}, which is none of {', '.join(names)}"
        for job in thing["spec"]["replicatedJobs"]:
            template = job["template"]
            made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"], **template.get("metadata", {})}}
            unknown = template.keys() - {"metadata", "spec"}
            if unknown:
                yield f"{job['name']}: template has no {', '.join(unknown)}"
            for problem in problems_of({**made, "spec": template.get("spec")}):
                yield f"{job['name']}: {problem}"


def main():
    rendered, failed = {}, False
    for path in sys.argv[1:]:
        if os.path.isdir(path):
            text = subprocess.run(["kubectl", "kustomize", path], check=True, stdout=subprocess.PIPE, text=True).stdout
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        rendered[path] = [thing for thing in yaml.safe_load_all(text) if thing]
        for thing in rendered[path] if os.path.isdir(path) else []:
            for problem in problems_of(thing):
                failed = True
                print(f"{path}: {thing['kind']} {thing['metadata']['name']}: {problem}", file=sys.stderr)
    json.dump(rendered, sys.stdout)
    sys.exit(failed)


if __name__ == "__main__":
    main()
