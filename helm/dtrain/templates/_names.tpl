{{/* Labels of the chart's own objects. Runs are told apart from them by managed-by: `dtrain`, not `Helm`. */}}
{{- define "dtrain.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: dtrain
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What an object is called: dict root, name (after the prefix), component, and namespace where it has one. */}}
{{- define "dtrain.metadata" -}}
name: {{ .root.Values.name }}-{{ .name }}
{{- with .namespace }}
namespace: {{ . }}
{{- end }}
labels:
  {{- include "dtrain.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* What selects the pods of one component: dict root, component. */}}
{{- define "dtrain.selector" -}}
app.kubernetes.io/name: dtrain
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "dtrain.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default (printf "%s-cpu" $.Chart.AppVersion) }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Where run folders live. */}}
{{- define "dtrain.storage" -}}
{{- if eq .Values.storage.kind "pvc" -}}
{{ .Values.storage.pvc.mountPath }}/runs
{{- else -}}
{{ .Values.storage.bucket.uri }}
{{- end -}}
{{- end }}

{{/* The Redis of Ray heads, host:port; empty when there is none. */}}
{{- define "dtrain.redis" -}}
{{- with .Values.redis -}}
{{- if .address -}}
{{ .address }}
{{- else if .enabled -}}
{{ $.Values.name }}-redis:6379
{{- end -}}
{{- end -}}
{{- end }}

{{/* What runs of the cluster file ask for and no flavor of Kueue has a quota of, as a list in YAML. */}}
{{- define "dtrain.withoutQuota" -}}
{{- $covered := list -}}
{{- range .Values.kueue.flavors }}{{ $covered = concat $covered (keys .quota) }}{{ end -}}
{{- $asked := list "cpu" "memory" -}}
{{- with .Values.clusterFile -}}
{{- if .machine.gpus }}{{ $asked = append $asked (dig "worker" "gpu_resource" "nvidia.com/gpu" .backend) }}{{ end -}}
{{- if dig "worker" "scratch_gib" "" .backend }}{{ $asked = append $asked "ephemeral-storage" }}{{ end -}}
{{- if gt (int .nodes) 1 }}{{ $asked = concat $asked (dig "network" "resources" dict .backend | keys | sortAlpha) }}{{ end -}}
{{- end -}}
{{- $missing := list -}}
{{- range $asked }}{{ if and $.Values.kueue.enabled (not (has . $covered)) }}{{ $missing = append $missing . }}{{ end }}{{ end -}}
{{- $missing | toYaml }}
{{- end }}

{{/* The namespace of KubeRay's operator. */}}
{{- define "dtrain.operatorNamespace" -}}
{{- with .Values.networkPolicy.operator.namespace -}}
{{ . }}
{{- else -}}
{{ ternary .Release.Namespace "ray-system" (index .Values "kuberay-operator").enabled }}
{{- end -}}
{{- end }}
