{{- define "posterior.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "posterior.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "posterior.labels" -}}
{{ include "posterior.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "posterior.keys" -}}
{{- if .Values.keys.existingSecret -}}
{{- if .Values.keys.toml -}}{{- fail "give keys.existingSecret or keys.toml, not both" -}}{{- end -}}
{{- .Values.keys.existingSecret -}}
{{- else if .Values.keys.toml -}}
{{- printf "%s-keys" (include "posterior.name" .) -}}
{{- else -}}
{{- fail "no key protects the servers: give keys.existingSecret or keys.toml (docs/serve.md, Keys)" -}}
{{- end -}}
{{- end -}}
