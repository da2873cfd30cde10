{{/* What every pod of this chart is held to; dict uid. The image's own user is 1000. */}}
{{- define "dtrain.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .uid }}
runAsGroup: {{ .uid }}
fsGroup: {{ .uid }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
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

{{/* How a pod with dtrain in it looks at runs: the cluster file, the storage, a place to write. */}}
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
{{- with .Values.storage.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
volumeMounts:
  - {name: cluster, mountPath: /etc/dtrain, readOnly: true}
  - {name: scratch, mountPath: /tmp}
  {{- if eq .Values.storage.kind "pvc" }}
  - {name: runs, mountPath: {{ .Values.storage.pvc.mountPath }}}
  {{- end }}
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
{{- end }}
