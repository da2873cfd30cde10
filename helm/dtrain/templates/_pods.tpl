{{/* What every pod of this chart is held to; dict uid, and gid where it is another number. */}}
{{- define "dtrain.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .uid }}
runAsGroup: {{ .gid | default .uid }}
fsGroup: {{ .gid | default .uid }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Who looks at runs is who runs are: their folders are written by both. The image's own user is 1000. */}}
{{- define "dtrain.clientSecurity" -}}
{{- $security := .Values.clusterFile.backend.security | default dict -}}
{{- include "dtrain.podSecurity" (dict "uid" (dig "user" 1000 $security | int64) "gid" (dig "group" 1000 $security | int64)) }}
{{- end }}

{{- define "dtrain.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Labels that a cloud looks for before it gives a pod its identity. */}}
{{- define "dtrain.identityLabels" -}}
{{- if eq .Values.storage.identity.provider "aks" }}
azure.workload.identity/use: "true"
{{- end }}
{{- end }}

{{/* How a pod with dtrain in it looks at runs: the cluster file, the storage, a place to write. It finds the storage as
     runs do: by the same environment and the same files of Secrets. */}}
{{- define "dtrain.clientContainer" -}}
image: {{ include "dtrain.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "dtrain.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .Values.supervisor.resources | nindent 2 }}
env:
  - {name: HOME, value: /tmp}
  - {name: PYTHONUNBUFFERED, value: "1"}
  {{- range $name, $value := omit (.Values.clusterFile.backend.env | default dict) "HOME" "PYTHONUNBUFFERED" }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- with include "dtrain.secretsOfRuns" . | fromYamlArray }}
envFrom:
  {{- range . }}
  - secretRef:
      name: {{ . }}
  {{- end }}
{{- end }}
volumeMounts:
  - {name: cluster, mountPath: /etc/dtrain, readOnly: true}
  - {name: scratch, mountPath: /tmp}
  {{- if eq .Values.storage.kind "pvc" }}
  - {name: runs, mountPath: {{ .Values.storage.pvc.mountPath }}}
  {{- end }}
  {{- range $number, $volume := .Values.clusterFile.backend.volumes }}
  {{- if $volume.secret }}
  - {name: secret-{{ $number }}, mountPath: {{ $volume.mount }}, readOnly: true}
  {{- end }}
  {{- end }}
{{- end }}

{{/* Secrets whose keys are environment of runs, as a list in YAML. */}}
{{- define "dtrain.secretsOfRuns" -}}
{{- $names := list -}}
{{- with .Values.storage.existingSecret }}{{ $names = append $names . }}{{ end -}}
{{- with .Values.clusterFile.backend.env_from }}{{ $names = concat $names . }}{{ end -}}
{{- $names | uniq | toYaml }}
{{- end }}

{{- define "dtrain.clientVolumes" -}}
- name: cluster
  configMap:
    name: {{ .Values.name }}-cluster
- name: scratch
  emptyDir:
    sizeLimit: 1Gi
{{- if eq .Values.storage.kind "pvc" }}
- name: runs
  persistentVolumeClaim:
    claimName: {{ .Values.storage.pvc.name }}
{{- end }}
{{- range $number, $volume := .Values.clusterFile.backend.volumes }}
{{- if $volume.secret }}
- name: secret-{{ $number }}
  secret:
    secretName: {{ $volume.secret }}
{{- end }}
{{- end }}
{{- end }}
