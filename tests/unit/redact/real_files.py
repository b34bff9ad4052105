"""Files as they lie in real projects, with made-up secrets in them, put together at run time."""

# ruff: noqa: E501, S608

from __future__ import annotations

import base64
import json
import string
import urllib.parse

from tests.unit.redact.canaries import body, jwt, private_key, random_text

P = "Tr0ub4" + "dor-Xq9v"
W = "hunter2" + "x9"
S = random_text(40)


def _hex(size: int) -> str:
    return random_text(size, string.digits + "abcdef")


H = _hex(32)
T20 = random_text(20, seed=5)


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


BASIC = b64(f"deploy:{P}")
KEY = private_key()


def indent(text: str, by: str) -> str:
    return "\n".join(by + line for line in text.splitlines())


FILES: list[tuple[str, str, str, str, list[str]]] = [
    # .env dialects
    ("env-plain", ".env", "utf-8", f"DB_PASSWORD={W}\nSTRIPE={S}\n", [W, S]),
    ("env-single-word-name", ".env", "utf-8", f"MAILGUN=key-{H}\nFOO=bluemonkey\n", [H, "bluemonkey"]),
    ("env-spaces", ".env", "utf-8", f"DB_PASSWORD = {W}\nOTHER = {P}\n", [W, P]),
    ("env-export", ".env.production", "utf-8", f"export AWS_SECRET_ACCESS_KEY={S}\nexport LOGIN={W}\n", [S, W]),
    ("env-quotes", "prod.env", "utf-8", f"A=\"{W} and more\"\nB='{P}'\n", [W, P, "and more"]),
    ("env-comment", ".env", "utf-8", f"# old: DB_PASSWORD={W}\n#DB_PASSWORD={P}\nX={S} # the key\n", [W, P, S]),
    ("env-multiline-quotes", ".env", "utf-8", f'SERVICE="line one {W}\nline two {P}\nline three"\nNEXT=x\n', [W, P]),
    ("env-multiline-key", ".env", "utf-8", f'PRIVATE="{KEY}"\n', body(KEY)),
    ("env-crlf", ".env", "utf-8", f"DB_PASSWORD={W}\r\nPLAIN={P}\r\n", [W, P]),
    ("env-lowercase", ".env.local", "utf-8", f"plain_thing={W}\n", [W]),
    ("env-colon", ".env", "utf-8", f"PLAIN: {W}\nDB_PASSWORD: {P}\n", [W, P]),
    ("env-escaped", ".env", "utf-8", 'PLAIN="ab\\"cd' + W + '"\n', [W]),
    ("env-backtick", ".env", "utf-8", f"PLAIN=`{W} `\n", [W]),
    ("env-specials", ".env", "utf-8", "PLAIN=p@$$w0rd#!x\nQ=correct horse battery staple\n", ["p@$$w0rd", "correct horse"]),
    ("env-url-cred", ".env", "utf-8", f"DATABASE_URL=postgres://u:{W}@db/x\n", [W]),
    ("env-short", ".env", "utf-8", "PINCODE=483920\nSALT=x7$k\n", ["483920", "x7$k"]),
    ("env-json", ".env", "utf-8", 'GOOGLE={"type":"service_account","k":"' + W + '"}\n', [W]),
    ("envrc", ".envrc", "utf-8", f"export PLAIN={W}\nlayout python\nPATH_add bin\n", [W]),
    ("docker-env-file", "docker/app.env", "utf-8", f"POSTGRES_PASSWORD={W}\nRMQ={P}\n", [W, P]),
    ("fish", ".env.fish", "utf-8", f"set -gx API_TOKEN {T20}\nset -x PLAIN {P}\n", [T20, P]),
    ("env-utf16", ".env", "utf16", f"DB_PASSWORD={W}\r\nPLAIN={P}\r\n", [W, P]),
    ("env-bom", ".env", "utf-8", "\ufeff" + f"PLAIN={W}\nDB_PASSWORD={P}\n", [W, P]),
    ("env-dev-dir", "config/env/production", "utf-8", f"DB_PASSWORD={W}\n", [W]),
    # docker compose
    (
        "compose-map",
        "docker-compose.yml",
        "utf-8",
        f'services:\n  db:\n    environment:\n      POSTGRES_PASSWORD: {W}\n      MYSQL_ROOT_PASSWORD: "{P}"\n',
        [W, P],
    ),
    (
        "compose-list",
        "docker-compose.yml",
        "utf-8",
        f"services:\n  db:\n    environment:\n      - POSTGRES_PASSWORD={W}\n      - \"REDIS_PASS={P}\"\n      - 'API_KEY={S}'\n",
        [W, P, S],
    ),
    (
        "compose-short-word",
        "compose.yaml",
        "utf-8",
        "services:\n  db:\n    environment:\n      POSTGRES_PASSWORD: bluemonkey\n",
        ["bluemonkey"],
    ),
    ("compose-command", "compose.yaml", "utf-8", f"    command: redis-server --requirepass {P}\n", [P]),
    (
        "dockerfile-arg",
        "Dockerfile",
        "utf-8",
        f'ARG NPM_TOKEN={T20}\nENV DB_PASSWORD={W} OTHER=1\nRUN echo "{W}" | docker login -u x --password-stdin\n',
        [T20, W],
    ),
    # kubernetes
    (
        "k8s-secret-data",
        "secret.yaml",
        "utf-8",
        f"apiVersion: v1\nkind: Secret\nmetadata:\n  name: db\ntype: Opaque\ndata:\n  password: {b64(W)}\n  username: {b64('admin')}\n  tls.key: {b64(KEY)}\n",
        [b64(W), b64(KEY)[:60]],
    ),
    (
        "k8s-secret-data-plainnames",
        "secret.yaml",
        "utf-8",
        f"apiVersion: v1\nkind: Secret\ndata:\n  mongo: {b64(W + 'zz')}\n  config.json: {b64(json.dumps({'auth': P}))}\n",
        [b64(W + "zz"), b64(json.dumps({"auth": P}))],
    ),
    ("k8s-secret-stringdata", "k8s/secret.yml", "utf-8", f"kind: Secret\nstringData:\n  value: {W}\n  token: {P}\n", [W, P]),
    (
        "k8s-deployment-env",
        "deploy.yaml",
        "utf-8",
        f"        env:\n        - name: DB_PASSWORD\n          value: {W}\n        - name: API_KEY\n          value: '{S}'\n",
        [W, S],
    ),
    (
        "k8s-secret-json",
        "secret.json",
        "utf-8",
        json.dumps({"kind": "Secret", "apiVersion": "v1", "data": {"mongo": b64(W + "zz")}}, indent=1),
        [b64(W + "zz")],
    ),
    (
        "kubeconfig",
        ".kube/config",
        "utf-8",
        f"users:\n- name: admin\n  user:\n    client-certificate-data: {b64('cert' * 30)}\n    client-key-data: {b64(KEY)}\n    token: {jwt()}\n- name: x\n  user:\n    username: admin\n    password: {W}\n",
        [b64(KEY)[:80], W, jwt()],
    ),
    ("kubeconfig-token", "kubeconfig", "utf-8", f"  user:\n    token: {H}.{S}\n", [H, S]),
    (
        "helm-values",
        "values.yaml",
        "utf-8",
        f'auth:\n  rootPassword: {W}\n  existingSecret: my-secret\n  replicationPassword: "{P}"\n',
        [W, P],
    ),
    # terraform
    ("tfvars", "terraform.tfvars", "utf-8", f'db_password = "{W}"\nregion = "eu"\nadmin_pass="{P}"\n', [W, P]),
    (
        "tfstate",
        "terraform.tfstate",
        "utf-8",
        json.dumps(
            {
                "resources": [
                    {
                        "instances": [
                            {
                                "attributes": {
                                    "password": W,
                                    "id": "x",
                                    "master_password": P,
                                    "secret_string": S,
                                    "private_key_pem": KEY,
                                    "connection_string": f"Server=x;Password={T20};",
                                }
                            }
                        ]
                    }
                ],
                "outputs": {"db_password": {"value": T20, "type": "string", "sensitive": True}},
            },
            indent=2,
        ),
        [W, P, S, *body(KEY), T20],
    ),
    (
        "tfstate-random",
        "terraform.tfstate",
        "utf-8",
        json.dumps(
            {"type": "random_password", "instances": [{"attributes": {"result": P, "bcrypt_hash": "$2a$10$" + random_text(53)}}]},
            indent=2,
        ),
        [P],
    ),
    (
        "tf-provider",
        "main.tf",
        "utf-8",
        'provider "aws" {\n  access_key = "AK'
        + "IA"
        + "ABCDEFGH234567QQ"
        + f'"\n  secret_key = "{S}"\n}}\nvariable "db_password" {{\n  default = "{P}"\n}}\n',
        [S, P],
    ),
    # Rails
    ("rails-master", "config/master.key", "utf-8", H + "\n", [H]),
    ("rails-cred-key", "config/credentials/production.key", "utf-8", H + "\n", [H]),
    (
        "rails-database",
        "config/database.yml",
        "utf-8",
        f"production:\n  adapter: postgresql\n  username: app\n  password: {W}\n  url: <%= ENV['X'] %>\n",
        [W],
    ),
    (
        "rails-secrets",
        "config/secrets.yml",
        "utf-8",
        f"production:\n  secret_key_base: {_hex(128)}\n  aws:\n    access: {S}\n",
        [_hex(128), S],
    ),
    ("rails-init", "config/initializers/x.rb", "utf-8", f"Stripe.api_key = '{S}'\nconfig.secret_key_base = \"{H}\"\n", [S, H]),
    # Spring
    (
        "spring-props",
        "application.properties",
        "utf-8",
        f"spring.datasource.password={W}\nspring.datasource.username=sa\njwt.secret={S}\nspring.mail.password = {P}\nserver.ssl.key-store-password=changeit1\n",
        [W, S, P, "changeit1"],
    ),
    (
        "spring-yml",
        "application-prod.yml",
        "utf-8",
        f"spring:\n  datasource:\n    password: '{W}'\n  security:\n    oauth2:\n      client:\n        client-secret: {S}\n",
        [W, S],
    ),
    (
        "spring-xml",
        "applicationContext.xml",
        "utf-8",
        f'<property name="password" value="{W}"/>\n<property name="password"><value>{P}</value></property>\n',
        [W, P],
    ),
    ("tomcat", "tomcat-users.xml", "utf-8", f'<user username="admin" password="{W}" roles="manager"/>\n', [W]),
    (
        "webconfig",
        "Web.config",
        "utf-8",
        f'<add name="Db" connectionString="Server=x;Database=y;User Id=sa;Password={W};" />\n<add key="ApiSecret" value="{P}" />\n',
        [W, P],
    ),
    (
        "appsettings",
        "appsettings.json",
        "utf-8",
        json.dumps(
            {"ConnectionStrings": {"Default": f"Server=.;User ID=sa;Pwd={W};"}, "Jwt": {"Key": S}, "Smtp": {"Password": P}},
            indent=2,
        ),
        [W, S, P],
    ),
    # PHP
    (
        "wp-config",
        "wp-config.php",
        "utf-8",
        f"define( 'DB_PASSWORD', '{W}' );\ndefine('AUTH_KEY',         'w7}}Rk|2p~:qD*,Zc$uVbN5+x(Y|fEo8!sT');\ndefine('NONCE_SALT', 'k2*Lm)9v#Qe;Xw^8pZ[Rt}}1Uy~Hs=Ga');\n",
        [W, "Rk|2p~:qD", "Lm)9v#Qe"],
    ),
    (
        "laravel",
        "config/database.php",
        "utf-8",
        f"'mysql' => [\n 'username' => 'root',\n 'password' => '{W}',\n],\n'password' => env('DB_PASSWORD', '{P}'),\n",
        [W, P],
    ),
    (
        "php-pdo",
        "db.php",
        "utf-8",
        f'$pdo = new PDO("mysql:host=x", "root", "{W}");\n$password = "{P}";\nmysqli_connect("localhost", "root", "{S}");\n',
        [P],
    ),
    # db files
    (".pgpass", ".pgpass", "utf-8", f"localhost:5432:app:bob:{W}\n*:*:*:al:correcthorse\n", [W, "correcthorse"]),
    (".my.cnf", ".my.cnf", "utf-8", f'[client]\nuser=root\npassword={W}\n[mysqldump]\npassword="ab{P}"\n', [W, P]),
    ("mylogin", "my.cnf", "utf-8", "[client]\npassword = correcthorse\n", ["correcthorse"]),
    ("odbc", "odbc.ini", "utf-8", f"[x]\nUID=sa\nPWD={W}\n", [W]),
    ("htpasswd", ".htpasswd", "utf-8", "bob:$apr1$" + "abcdefgh$" + random_text(22) + "\n", [random_text(22)]),
    # cloud
    (
        "gcloud",
        "gcp-key.json",
        "utf-8",
        json.dumps({"type": "service_account", "private_key_id": _hex(40), "private_key": KEY + "\n", "client_email": "x@y.iam"}),
        [*body(KEY)],
    ),
    (
        "gcloud-adc",
        "application_default_credentials.json",
        "utf-8",
        json.dumps(
            {
                "client_id": "764.apps",
                "client_secret": "d-FL95Q19q7MQmFpd7hHD0Ty",
                "refresh_token": "1//0" + random_text(60),
                "type": "authorized_user",
            }
        ),
        ["d-FL95Q19q7MQmFpd7hHD0Ty", random_text(60)],
    ),
    (
        "aws-cred",
        ".aws/credentials",
        "utf-8",
        "[default]\naws_access_key_id = AK"
        + "IA"
        + "ABCDEFGH234567QQ"
        + f"\naws_secret_access_key = {S}\naws_session_token = {S}{S}\n",
        [S],
    ),
    ("aws-config", ".aws/config", "utf-8", f"[profile x]\nregion = eu\naws_secret_access_key = {S}\n", [S]),
    ("s3cfg", ".s3cfg", "utf-8", f"[default]\naccess_key = {T20.upper()}\nsecret_key = {S}\ngpg_passphrase = {W}\n", [S, W]),
    ("azure-profile", "azureProfile.json", "utf-8", json.dumps({"accessToken": jwt(), "clientSecret": P}), [P]),
    (
        "rclone",
        "rclone.conf",
        "utf-8",
        f"[r]\ntype = b2\naccount = 12\nkey = {S}\npass = {random_text(30)}\n",
        [S, random_text(30)],
    ),
    ("doctl", "config.yaml", "utf-8", f"access-token: {S}\n", [S]),
    # ssh etc
    ("ssh-config", ".ssh/config", "utf-8", f"Host x\n  ProxyCommand sshpass -p {W} ssh -W %h:%p jump\n", [W]),
    ("ssh-key", ".ssh/id_ed25519", "utf-8", private_key("OPENSSH PRIVATE KEY", 5), body(private_key("OPENSSH PRIVATE KEY", 5))),
    (
        "netrc",
        ".netrc",
        "utf-8",
        f"machine x login y password {W}\nmachine z\n\tlogin q\n\tpassword correcthorse\n",
        [W, "correcthorse"],
    ),
    ("netrc-macdef", "_netrc", "utf-8", f"machine x password {W} login y\n", [W]),
    # package managers
    ("npmrc", ".npmrc", "utf-8", f"//r.x/:_authToken={S}\n_password={b64(W)}\nalways-auth=true\n//r/:username=bob\n", [S, b64(W)]),
    ("yarnrc-yml", ".yarnrc.yml", "utf-8", f'npmScopes:\n  x:\n    npmAuthToken: {S}\n    npmAuthIdent: "bob:{P}"\n', [S, P]),
    ("yarnrc", ".yarnrc", "utf-8", f'"//r/:_authToken" "{S}"\n', [S]),
    ("pnpm-workspace", ".npmrc", "utf-8", f'@a:registry=https://x\n//x/:_auth="{BASIC}"\n', [BASIC]),
    (
        "pip",
        "pip.conf",
        "utf-8",
        f"[global]\nindex-url = https://bob:{W}@pypi.x/simple\nextra-index-url = https://{S}@y/simple\n",
        [W, S],
    ),
    ("pip-ini", "pip/pip.ini", "utf-8", f"[global]\r\nindex-url = https://bob:{W}@pypi.x/simple\r\n", [W]),
    ("pypirc", ".pypirc", "utf-8", f"[pypi]\nusername = __token__\npassword = {W}\n", [W]),
    ("poetry-auth", "auth.toml", "utf-8", f'[http-basic.x]\nusername = "bob"\npassword = "{W}"\n', [W]),
    ("cargo", ".cargo/credentials.toml", "utf-8", f'[registry]\ntoken = "cio{S}"\n', [S]),
    ("cargo-old", ".cargo/credentials", "utf-8", '[registries.x]\ntoken = "correcthorse"\n', ["correcthorse"]),
    (
        "gradle",
        "gradle.properties",
        "utf-8",
        f"signing.password={W}\nsonatypePassword=correcthorse\nossrhToken={S}\norg.gradle.jvmargs=-Xmx2g\n",
        [W, "correcthorse", S],
    ),
    (
        "maven",
        ".m2/settings.xml",
        "utf-8",
        f"<server>\n  <id>x</id>\n  <username>bob</username>\n  <password>{W}</password>\n</server>\n<passphrase>correcthorse</passphrase>\n",
        [W, "correcthorse"],
    ),
    (
        "composer",
        "auth.json",
        "utf-8",
        json.dumps({"http-basic": {"x.com": {"username": "bob", "password": W}}, "github-oauth": {"github.com": S}}),
        [W, S],
    ),
    ("nuget", "NuGet.Config", "utf-8", f'<add key="ClearTextPassword" value="{W}" />\n<add key="Username" value="b" />\n', [W]),
    (
        "bundle",
        ".bundle/config",
        "utf-8",
        f'---\nBUNDLE_GEMS__X__COM: "bob:{P}"\nBUNDLE_GITHUB__COM: "{S}:x-oauth-basic"\n',
        [P, S],
    ),
    ("gem", ".gem/credentials", "utf-8", f"---\n:rubygems_api_key: rubygems_{_hex(48)}\n", [_hex(48)]),
    ("gh-hosts", ".config/gh/hosts.yml", "utf-8", f"github.com:\n    oauth_token: {S}\n    user: x\n", [S]),
    ("hub", ".config/hub", "utf-8", f"github.com:\n- user: x\n  oauth_token: {S}\n", [S]),
    (
        "docker-config",
        ".docker/config.json",
        "utf-8",
        json.dumps({"auths": {"x": {"auth": b64("a:b1")}, "y": {"identitytoken": S}}}),
        [b64("a:b1"), S],
    ),
    ("docker-config2", "config.json", "utf-8", json.dumps({"auths": {"x": {"auth": BASIC}}}, indent=2), [BASIC]),
    ("containers-auth", "run/containers/auth.json", "utf-8", json.dumps({"auths": {"x": {"auth": BASIC}}}, indent=2), [BASIC]),
    # sql dump
    (
        "sql-dump",
        "dump.sql",
        "utf-8",
        f"CREATE USER app WITH PASSWORD '{W}';\nALTER ROLE x PASSWORD 'md5{H}';\nCREATE USER 'a'@'%' IDENTIFIED BY '{P}';\nGRANT ALL ON x.* TO y IDENTIFIED BY '{T20}';\nSET PASSWORD FOR 'a' = PASSWORD('{S}');\n",
        [W, H, P, T20, S],
    ),
    (
        "sql-insert",
        "seed.sql",
        "utf-8",
        f"INSERT INTO users (id, email, password_hash) VALUES (1, 'a@b', '$2b$12${random_text(53)}');\n",
        [random_text(53)],
    ),
    # history and logs
    (
        "bash-history",
        ".bash_history",
        "utf-8",
        f"curl -u bob:{W} https://x\ncurl --user 'al:{P}' https://y\nmysql -uroot -p{T20} app\nexport TOKEN={S}\nsshpass -p '{W}q' ssh x\npsql postgresql://a:{H}@h/d\nAWS_SECRET_ACCESS_KEY={S}x aws s3 ls\ndocker login -u bob -p {W}zz\nhttp -a bob:{P}yy example.org\n",
        [W, P, T20, S, H],
    ),
    (
        "curl-header",
        "run.log",
        "utf-8",
        f'+ curl -sSL -H \'X-Auth-Token: {T20}\' -H "Authorization: Bearer {S}" -d \'{{"password":"{W}"}}\' https://x\n',
        [T20, S, W],
    ),
    (
        "wget",
        "ci.log",
        "utf-8",
        f"wget --http-user=bob --http-password={W} https://x\nwget --header='Authorization: Basic {BASIC}' u\n",
        [W, BASIC],
    ),
    ("log-kv", "app.log", "utf-8", f'time="2026" level=info msg="login" user=bob password={W} token={S}\n', [W, S]),
    (
        "log-params",
        "production.log",
        "utf-8",
        f'Parameters: {{"utf8"=>"x", "user"=>{{"email"=>"a@b", "password"=>"{W}"}}, "api_key"=>"{S}"}}\n',
        [W, S],
    ),
    (
        "log-go",
        "go.log",
        "utf-8",
        f"config: {{Host:db Port:5432 User:app Password:{W} SSL:false}}\nmap[password:{P} user:x]\n",
        [W, P],
    ),
    ("log-java", "java.log", "utf-8", f"Config(username=bob, password={W}, url=x)\nDbConfig{{user='x', password='{P}'}}\n", [W, P]),
    ("rust-debug", "rust.log", "utf-8", f'Config {{ user: "x", password: "{W}", token: Some("{S}") }}\n', [W, S]),
    (
        "har",
        "x.har",
        "utf-8",
        json.dumps(
            {
                "log": {
                    "entries": [
                        {
                            "request": {
                                "headers": [
                                    {"name": "Authorization", "value": f"Bearer {S}"},
                                    {"name": "Cookie", "value": f"sid={T20}"},
                                    {"name": "X-Api-Key", "value": H},
                                ],
                                "cookies": [{"name": "session_id", "value": P}],
                                "queryString": [{"name": "access_token", "value": W}],
                                "postData": {
                                    "text": f"username=bob&password={W}",
                                    "params": [{"name": "password", "value": W + "z"}],
                                },
                            }
                        }
                    ]
                }
            },
            indent=1,
        ),
        [S, T20, H, W],
    ),
    (
        "har-min",
        "x.har",
        "utf-8",
        json.dumps(
            {
                "headers": [
                    {"name": "Authorization", "value": f"Token {S}"},
                    {"value": f"sid={T20}; a=b", "name": "Cookie"},
                    {"name": "Set-Cookie", "value": f"sess={H}; Path=/"},
                ]
            },
            separators=(",", ":"),
        ),
        [S, T20, H],
    ),
    (
        "jupyter",
        "x.ipynb",
        "utf-8",
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "source": [f'password = "{W}"\n', f"os.environ['API_KEY'] = '{S}'\n", f"%env TOKEN={T20}\n"],
                        "outputs": [{"text": [f"{{'password': '{P}'}}\n"]}],
                    }
                ]
            },
            indent=1,
        ),
        [W, S, T20, P],
    ),
    (
        "url-encoded",
        "body.txt",
        "utf-8",
        f"username=bob&password={urllib.parse.quote(W + '!@#')}&x=1&client_secret={urllib.parse.quote(P)}\n",
        [W, P],
    ),
    ("url-userinfo-enc", "u.txt", "utf-8", f"https://bob:{urllib.parse.quote('p@ss/' + W, safe='')}@x/y\n", [W]),
    (
        "json-in-json",
        "x.json",
        "utf-8",
        json.dumps({"body": json.dumps({"password": W, "inner": json.dumps({"api_key": S})})}),
        [W, S],
    ),
    ("csv-users", "users.csv", "utf-8", f"id,name,password\n1,bob,{W}\n2,al,{P}\n", [W, P]),
    ("csv-quoted", "users.csv", "utf-8", f'"login","password","x"\n"bob","{W}","1"\n', [W]),
    (
        "csv-aws",
        "credentials.csv",
        "utf-8",
        f"User name,Password,Access key ID,Secret access key\nbob,{W},AK" + "IA" + f"ABCDEFGH234567QQ,{S}\n",
        [S, W],
    ),
    ("csv-aws2", "bob_accessKeys.csv", "utf-8", "Access key ID,Secret access key\nAK" + "IA" + f"ABCDEFGH234567QQ,{S}\n", [S]),
    (
        "minified",
        "app.min.js",
        "utf-8",
        f'!function(e){{var t={{apiKey:"{S}",password:"{W}",authDomain:"x"}};e.token="{T20}",e.x=1}}(window);',
        [S, W, T20],
    ),
    (
        "python-repr",
        "x.log",
        "utf-8",
        f"{{'user': 'x', 'password': '{W}', 'token': b'{T20}'}}\nConfig(password='{P}', api_key=SecretStr('**'))\n",
        [W, T20, P],
    ),
    ("pydantic", "x.log", "utf-8", f"Settings(db_password='{W}', token='{S}')", [W, S]),
    (
        "locals",
        "trace.log",
        "utf-8",
        f"  File x.py, line 3, in f\n    password = '{W}'\n    self = <X>\n    kwargs = {{'api_key': '{S}'}}\n    auth = ('bob', '{P}')\n",
        [W, S],
    ),
    ("django-debug", "t.html", "utf-8", f"<td>password</td>\n<td class='code'><pre>&#x27;{W}&#x27;</pre></td>", [W]),
    ("sentry", "ev.json", "utf-8", json.dumps({"vars": {"password": f"'{W}'", "token": f"u'{S}'"}}), [W, S]),
    ("latin1", "app.ini", "latin1", f"[db]\nname=caf\xe9\npassword={W}\xe9\nfoo_secret=\xfc{P}\n", [W, P]),
    ("utf16be", "app.ini", "utf16be", f"[db]\r\npassword={W}\r\n", [W]),
    ("crlf-ini", "app.ini", "utf-8", f"[db]\r\npassword = {W}\r\nsecret={S}\r\n", [W, S]),
    ("yaml-block", "x.yml", "utf-8", f"password: |\n  {W}\ntoken: >-\n  {S}\n", [W, S]),
    ("yaml-block2", "x.yml", "utf-8", f"secret_text: |-\n    first line\n    {S}\n", [S]),
    ("yaml-key", "x.yml", "utf-8", f"tls:\n  key: |\n{indent(KEY, '    ')}\n", body(KEY)),
    ("yaml-anchor", "x.yml", "utf-8", f"password: &pw {W}\nother: *pw\npassword2: !!str {P}\n", [W, P]),
    ("yaml-flow", "x.yml", "utf-8", f"db: {{user: x, password: {W}, host: y}}\n", [W]),
    ("yaml-list", "x.yml", "utf-8", f"passwords:\n  - {W}\n  - {P}\n", [W, P]),
    ("json-list", "x.json", "utf-8", json.dumps({"tokens": [S, T20], "passwords": [W, P]}), [S, T20, W, P]),
    ("json-list-i", "x.json", "utf-8", json.dumps({"tokens": [S, T20], "passwords": [W, P]}, indent=2), [S, T20, W, P]),
    ("toml", "settings.toml", "utf-8", f"[default]\npassword = \"{W}\"\ntoken = '''{S}'''\n", [W, S]),
    (
        "django",
        "settings.py",
        "utf-8",
        f"SECRET_KEY = 'django-insecure-x8#k2&z!q^7$m(p@d4+w=e*r_t9'\nDATABASES = {{'default': {{'PASSWORD': '{W}'}}}}\nEMAIL_HOST_PASSWORD = '{P}'\n",
        ["x8#k2&z", W, P],
    ),
    (
        "flask",
        "config.py",
        "utf-8",
        f"app.secret_key = b'_5#y2L\"F4Q8z\\n\\xec]/'\nSQLALCHEMY_DATABASE_URI = 'mysql://u:{W}@h/d'\n",
        ['y2L"F4Q8z', W],
    ),
    (
        "jenkins",
        "credentials.xml",
        "utf-8",
        f"<password>{{AQAAABAAAAAQ{S}}}</password>\n<secret>{S}x</secret>\n<apiToken>{H}</apiToken>\n<privateKey>{KEY}</privateKey>",
        [S, H, *body(KEY)],
    ),
    (
        "ansible",
        "group_vars/all.yml",
        "utf-8",
        f'ansible_become_pass: {W}\nansible_ssh_pass: "{P}"\nvault_db_pass: {T20}\n',
        [W, P, T20],
    ),
    ("ansible-ini", "hosts", "utf-8", f"web1 ansible_user=x ansible_ssh_pass={W} ansible_become_password={P}\n", [W, P]),
    ("vault-pass", ".vault_pass", "utf-8", "correcthorsebattery\n", ["correcthorse"]),
    (
        "gitlab-ci",
        ".gitlab-ci.yml",
        "utf-8",
        f'variables:\n  DEPLOY_TOKEN: "{T20}"\n  DB_PASS: {W}\nscript:\n  - docker login -u x -p {P} reg\n',
        [T20, W, P],
    ),
    ("travis", ".travis.yml", "utf-8", f'env:\n  global:\n    - API_KEY={S}\n    - secure: "{b64(S) * 4}"\n', [S]),
    ("gha", ".github/workflows/x.yml", "utf-8", f"env:\n  NPM_TOKEN: {S}\n  KEEP: ${{{{ secrets.X }}}}\n", [S]),
    ("systemd", "x.service", "utf-8", f'[Service]\nEnvironment="DB_PASSWORD={W}" FOO=1\nEnvironment=API_TOKEN={S}\n', [W, S]),
    (
        "nginx",
        "nginx.conf",
        "utf-8",
        f'proxy_set_header Authorization "Basic {BASIC}";\nproxy_set_header X-Api-Key {S};\n',
        [BASIC, S],
    ),
    ("redis-conf", "redis.conf", "utf-8", f"requirepass {P}\nmasterauth {W}\nuser default on >{T20} ~* +@all\n", [P, W, T20]),
    ("filezilla", "sitemanager.xml", "utf-8", f'<Pass encoding="base64">{b64(W)}</Pass>', [b64(W)]),
    ("wpa", "wpa_supplicant.conf", "utf-8", f'network={{\n ssid="x"\n psk="{W} z"\n}}\n', [W]),
    (
        "wireguard",
        "wg0.conf",
        "utf-8",
        f"[Interface]\nPrivateKey = {b64(random_text(32))}\n[Peer]\nPresharedKey = {b64(random_text(32, seed=9))}\n",
        [b64(random_text(32)), b64(random_text(32, seed=9))],
    ),
    ("openvpn", "x.ovpn", "utf-8", f"<auth-user-pass>\nbob\n{W}\n</auth-user-pass>\n<key>\n{KEY}\n</key>\n", [*body(KEY)]),
    (
        "ovpn-static",
        "ta.key",
        "utf-8",
        "-----BEGIN OpenVPN Static key V1-----\n"
        + "\n".join(_hex(32) for _ in range(16))
        + "\n-----END OpenVPN Static key V1-----\n",
        [_hex(32)],
    ),
    (
        "ssh2-key",
        "k.ppk",
        "utf-8",
        f"PuTTY-User-Key-File-2: ssh-rsa\nEncryption: none\nPrivate-Lines: 2\n{random_text(64)}\n{random_text(30)}\nPrivate-MAC: {_hex(40)}\n",
        [random_text(64)],
    ),
    (
        "jks-props",
        "keystore.properties",
        "utf-8",
        f"storePassword={W}\nkeyPassword=correcthorse\nkeyAlias=x\n",
        [W, "correcthorse"],
    ),
    ("android", "local.properties", "utf-8", f"sdk.dir=/x\nMAPS_API_KEY={S}\n", [S]),
    (
        "google-services",
        "google-services.json",
        "utf-8",
        json.dumps({"api_key": [{"current_key": "AI" + "za" + random_text(35)}]}),
        [random_text(35)],
    ),
    ("firebase", "f.js", "utf-8", f'const firebaseConfig = {{ apiKey: "{S}", appId: "1:2:web:3" }};\n', [S]),
    ("swift", "x.swift", "utf-8", f'let apiKey = "{S}"\nlet password: String = "{W}"\n', [S, W]),
    (
        "go",
        "x.go",
        "utf-8",
        f'const apiKey = "{S}"\npassword := "{W}"\nvar t = Conf{{Password: "{P}", Token: `{T20}`}}\n',
        [S, W, P, T20],
    ),
    (
        "kotlin",
        "x.kt",
        "utf-8",
        f'private const val API_KEY = "{S}"\nbuildConfigField("String", "API_TOKEN", "\\"{T20}\\"")\n',
        [S, T20],
    ),
    ("elixir", "prod.exs", "utf-8", f'config :x, X.Repo, password: "{W}"\nsecret_key_base: "{S}{S[:24]}"\n', [W, S]),
    ("perl", "x.pl", "utf-8", f'my $password = "{W}";\nDBI->connect("dbi:x", user => "a", password => "{P}");\n', [W, P]),
    ("shell", "x.sh", "utf-8", f"PASSWORD={W}\nexport DB_PASS='{P}'\nTOKEN=\"{S}\"\nreadonly API_KEY={T20}\n", [W, P, S, T20]),
    (
        "powershell",
        "x.ps1",
        "utf-8",
        f'$env:API_KEY = "{S}"\n$pw = ConvertTo-SecureString "{W}" -AsPlainText -Force\n$Password = \'{P}\'\n',
        [S, W, P],
    ),
    ("batch", "x.bat", "utf-8", f"set DB_PASSWORD={W}\r\nset API_KEY={S}\r\nsetx TOKEN {T20}\r\n", [W, S, T20]),
    ("makefile", "Makefile", "utf-8", f"TOKEN := {S}\nPASSWORD ?= {W}\n", [S, W]),
    ("vim-swap-like", "x.txt", "utf-8", f"my password is {W}\nPassword: {P}\npassword - {T20}\npw: {S}\n", [P, S]),
    ("erlang-cookie", ".erlang.cookie", "utf-8", T20.upper(), [T20.upper()]),
    ("vault-token", ".vault-token", "utf-8", f"s.{random_text(24)}\n", [random_text(24)]),
    (
        "age-keys",
        "keys.txt",
        "utf-8",
        "# public key: age1x\nAGE-" + "SECRET-KEY-1" + "Q" * 10 + random_text(48, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"),
        [random_text(48, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")],
    ),
    (
        "jwk",
        "jwk.json",
        "utf-8",
        json.dumps(
            {
                "kty": "RSA",
                "n": random_text(86),
                "e": "AQAB",
                "d": random_text(86, seed=1),
                "p": random_text(43, seed=2),
                "q": random_text(43, seed=3),
            }
        ),
        [random_text(86, seed=1), random_text(43, seed=2), random_text(43, seed=3)],
    ),
    (
        "jwk-oct",
        "jwks.json",
        "utf-8",
        json.dumps({"keys": [{"kty": "oct", "k": random_text(43, seed=4), "alg": "HS256"}]}),
        [random_text(43, seed=4)],
    ),
    (
        "postman",
        "env.postman_environment.json",
        "utf-8",
        json.dumps(
            {"values": [{"key": "password", "value": W, "enabled": True}, {"key": "apiToken", "type": "secret", "value": P}]},
            indent=2,
        ),
        [W, P],
    ),
    ("insomnia-auth", "x.json", "utf-8", json.dumps({"authentication": {"type": "basic", "username": "b", "password": W}}), [W]),
    ("vscode", "settings.json", "utf-8", '{\n  // c\n  "db.password": "' + W + '",\n  "x.apiKey": "' + S + '",\n}\n', [W, S]),
    ("mssql", "x.txt", "utf-8", f"sqlcmd -S x -U sa -P {W}\nbcp -Usa -P{P}\n", []),
    ("proc-environ", "environ", "utf-8", f"PATH=/bin\0DB_PASSWORD={W}\0API={S}\0", [W]),
    (
        "git-url-log",
        "x.log",
        "utf-8",
        f"fatal: unable to access 'https://bob:{W}@github.com/x.git/': 403\nCloning https://{S}@github.com/x\n",
        [W, S],
    ),
    ("basic-in-url-log", "x.log", "utf-8", f"GET /?auth={BASIC}&apikey={T20} HTTP/1.1\n", [BASIC, T20]),
    (
        "s3-presigned",
        "x.log",
        "utf-8",
        f"https://b.s3.amazonaws.com/x?X-Amz-Signature={_hex(64)}&X-Amz-Security-Token={S}{S}\n",
        [_hex(64), S],
    ),
    ("dsn", "x.py", "utf-8", f'sentry_sdk.init("https://{H}@o1.ingest.sentry.io/2")\nDSN = "user:{W}@tcp(db:3306)/x"\n', [H, W]),
    ("telegram", "x.py", "utf-8", f'bot = Bot("123456789:AA{random_text(33)}")\n', [random_text(33)]),
    ("twilio", "x.py", "utf-8", f'Client("AC{H}", "{_hex(32)}")\nTWILIO_AUTH_TOKEN = "{_hex(32)}"\n', []),
    ("mailgun", "x.py", "utf-8", f'auth=("api", "key-{H}")\n', [H]),
    (
        "google-oauth-refresh",
        "token.json",
        "utf-8",
        json.dumps({"token": "ya29." + random_text(60), "refresh_token": "1//0" + random_text(60)}),
        [random_text(60)],
    ),
    (
        "env-in-json",
        "ecs.json",
        "utf-8",
        json.dumps({"environment": [{"name": "DB_PASSWORD", "value": W}, {"value": P, "name": "API_SECRET"}]}),
        [W, P],
    ),
    (
        "zsh-history",
        ".zsh_history",
        "utf-8",
        f": 1700000000:0;export GITHUB_TOKEN={S}\n: 1700000001:0;mysql -u root -p'{W}'\n",
        [S, W],
    ),
    ("psql-history", ".psql_history", "utf-8", f"ALTER USER bob WITH PASSWORD '{W}';\n\\password bob\n", [W]),
    (
        "mongo",
        "x.js",
        "utf-8",
        f'db.createUser({{user: "x", pwd: "{W}", roles: []}})\nmongoose.connect("mongodb+srv://a:{P}@c.mongodb.net/x")\n',
        [W, P],
    ),
    ("ldap", "ldap.conf", "utf-8", f"bindpw {W}\nrootpw {{SSHA}}{S}\nldap_bind_password = {P}\n", [W, P]),
    ("fstab", "creds.smb", "utf-8", f"username=bob\npassword={W}\n", [W]),
    ("msmtp", ".msmtprc", "utf-8", f"account x\nuser y\npassword {W}\n", [W]),
    ("muttrc", ".muttrc", "utf-8", f'set imap_pass = "{W}"\nset smtp_url = "smtp://a:{P}@x"\n', [W, P]),
    ("irssi", ".weechat.conf", "utf-8", f'irc.server.x.password = "{W}"\n', [W]),
]
"""``(what, path, encoding, text, the parts that must be gone)``."""
