package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const service = `
services:
  store:
    image: store:1.2.3
    environment:
      PASSWORD: ${PASSWORD:?fill in}
    ports: ["127.0.0.1:${PORT:-80}:80"]
`

func written(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "docker-compose.yml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestWhatIsAcceptedAndRefused(t *testing.T) {
	for name, one := range map[string]struct{ text, told string }{
		"a required secret":       {service, ""},
		"a secret with a default": {strings.Replace(service, ":?fill in", ":-guess", 1), "may be left empty"},
		"a secret without a mark": {strings.Replace(service, ":?fill in", "", 1), "may be left empty"},
		"an unknown key":          {service + "    portz: []\n", "portz"},
		"an unknown volume":       {service + "    volumes: [\"data:/data\"]\n", "data"},
		"an unknown dependency":   {service + "    depends_on: [other]\n", "other"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := check(written(t, one.text), map[string]string{"PASSWORD": "", "PORT": "81"})
			if one.told == "" && err != nil {
				t.Fatalf("expected no fault, got %v", err)
			}
			if one.told != "" && (err == nil || !strings.Contains(err.Error(), one.told)) {
				t.Fatalf("expected a fault that says %q, got %v", one.told, err)
			}
		})
	}
}

func TestVariablesReachTheModelAndIncludedFiles(t *testing.T) {
	inner := written(t, service)
	outer := written(t, "include: [\""+inner+"\"]\n")
	variables := map[string]string{"PASSWORD": "", "PORT": "81"}
	project, err := check(outer, variables)
	if err != nil {
		t.Fatal(err)
	}
	if got := describe(project); len(got) != 1 || got[0] != "store (store:1.2.3, 127.0.0.1:81->80)" {
		t.Fatalf("expected the included service with its port, got %v", got)
	}
	lax := written(t, strings.Replace(service, ":?fill in", ":-guess", 1))
	if _, err := check(written(t, "include: [\""+lax+"\"]\n"), variables); err == nil {
		t.Fatal("expected the included default of a secret to be a fault")
	}
}
