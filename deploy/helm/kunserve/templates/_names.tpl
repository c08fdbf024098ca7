{{- define "kunserve.name" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* What tells this release's pods from others; of a Deployment it may never change. */}}
{{- define "kunserve.selector" -}}
app.kubernetes.io/name: kunserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kunserve.labels" -}}
{{ include "kunserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "kunserve.members" -}}
{{ include "kunserve.name" . }}-members
{{- end }}

{{- define "kunserve.scheme" -}}
{{ ternary "https" "http" (ne .Values.router.tls.secret "") }}
{{- end }}

{{/* Of both kinds of pods: nothing that a container does needs more than this. */}}
{{- define "kunserve.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kunserve.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}
