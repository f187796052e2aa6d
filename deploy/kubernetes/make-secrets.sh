#!/usr/bin/env bash
# Makes the secrets of one job: a token, an authority, and a certificate for the coordinator's Service. Prints two Secrets:
#   deploy/kubernetes/make-secrets.sh NAMESPACE | kubectl apply -n NAMESPACE -f -
# Nothing stays on this machine. Again for new ones; then delete the pods one by one, and they come back with them.
set -euo pipefail
namespace=${1:?usage: make-secrets.sh NAMESPACE}
days=825
umask 077
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }
key ca.key
openssl req -x509 -new -key ca.key -sha256 -days $days -subj '/CN=peapod authority' \
  -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign,cRLSign' -out ca.crt
key tls.key
openssl req -new -key tls.key -subj '/CN=peapod coordinator' -out tls.csr
cat > extensions <<END
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth
subjectAltName=DNS:peapod-coordinator,DNS:peapod-coordinator.$namespace,DNS:peapod-coordinator.$namespace.svc,DNS:localhost,IP:127.0.0.1
END
openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days $days -extfile extensions -out tls.crt 2>/dev/null
openssl rand -hex 32 > token

secret() { # NAME TYPE FILE...
  printf 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  labels:\n    app.kubernetes.io/name: peapod\ntype: %s\ndata:\n' "$1" "$2"
  for file in "${@:3}"; do
    printf '  %s: %s\n' "$file" "$(base64 -w 0 "$file")"
  done
}
# The coordinator alone sees the key; the authority's own key is forgotten.
secret peapod-tls kubernetes.io/tls tls.crt tls.key
echo ---
secret peapod-join Opaque token ca.crt
